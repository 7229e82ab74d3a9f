"""Replaces the service that publishes {{ cookiecutter.hears }}, in tests and by hand:

lightbus publish tests.elsewhere:app {{ cookiecutter.hears }} id=1
"""

import attrs
from lightbus import Lightbus

app = Lightbus("elsewhere")


@app.event("{{ cookiecutter.hears }}")
@attrs.frozen(kw_only=True)
class {{ cookiecutter.__consumed_class }}:
    id: str
