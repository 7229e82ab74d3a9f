from django.db import migrations, models


class Migration(migrations.Migration):
    operations = (
        migrations.CreateModel(
            "Invoice",
            [
                ("number", models.BigAutoField(primary_key=True, serialize=False)),
                ("order", models.CharField(max_length=50)),
                ("cents", models.IntegerField()),
            ],
        ),
    )
