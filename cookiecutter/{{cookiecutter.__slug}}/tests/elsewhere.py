"""Replaces the service that publishes {{ cookiecutter.consumes }}, in tests and by hand:

lightbus publish tests.elsewhere:app {{ cookiecutter.consumes }} id=1
"""

import attrs
from lightbus import Lightbus

app = Lightbus("elsewhere")


@app.event("{{ cookiecutter.consumes }}")
@attrs.frozen(kw_only=True)
class {{ cookiecutter.__consumed_class }}:
    id: str
