from django.db import models


class Order(models.Model):
    id = models.UUIDField(primary_key=True)
    email = models.EmailField()
    confirmed = models.BooleanField(default=False)
