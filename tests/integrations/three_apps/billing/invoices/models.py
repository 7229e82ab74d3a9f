from typing import ClassVar

from django.db import models


class Invoice(models.Model):
    number = models.BigAutoField(primary_key=True)
    order = models.CharField(max_length=50)  # not unique: only the inbox keeps duplicates out
    cents = models.IntegerField()

    objects: ClassVar[models.Manager["Invoice"]]
