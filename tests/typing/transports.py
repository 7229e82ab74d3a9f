"""Both transports have what the port asks for."""

from lightbus.transport import Channel, Connection, WatchedConnection
from lightbus.transport.amqp import channel as amqp_channel
from lightbus.transport.amqp import connection as amqp_connection
from lightbus.transport.sqlite import channel as sqlite_channel
from lightbus.transport.sqlite import connection as sqlite_connection


def connections(amqp: amqp_connection.Connection, sqlite: sqlite_connection.Connection) -> list[Connection]:
    return [amqp, sqlite]


def channels(amqp: amqp_channel.Channel, sqlite: sqlite_channel.Channel) -> list[Channel]:
    return [amqp, sqlite]


def watched(amqp: amqp_connection.Connection) -> WatchedConnection:
    return amqp
