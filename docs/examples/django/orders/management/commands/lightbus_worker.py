"""Runs the worker with Django's settings: `python manage.py lightbus_worker`. Worker options follow `--`."""

from argparse import ArgumentParser

from django.core.management.base import BaseCommand

from lightbus.cli import main


class Command(BaseCommand):
    help = "Handle the shop's events until stopped, like `lightbus worker`."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("options", nargs="*", help="of `lightbus worker`, as in -- --processes 2 --queue main")

    def handle(self, *, options: list[str], **_: object) -> None:
        main(["worker", "shop.worker:bus", *options], prog_name="lightbus")
