"""Django's management commands of Lightbus: one file each."""
