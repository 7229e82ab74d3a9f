"""A handler: its patterns, its function, its options. The signature is resolved once, at registration."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import attrs
import msgspec

from lightbus import errors, options, pydantic_models
from lightbus.event import PYDANTIC, event_type_of, lossy_part, unreadable_part
from lightbus.message import Message
from lightbus.pattern import topic_matches
from lightbus.retry import Retry
from lightbus.transport import Delivery
from lightbus.wire import codec, topology

TIMEOUT = 60.0
"""Seconds: the default."""
LONGEST_TIMEOUT = 1500.0
"""Seconds: 25 minutes. RabbitMQ closes the channel of a consumer that holds a delivery for 30 minutes."""

Arguments = tuple[Any, ...]


class Injected:
    """Marks a parameter in `Annotated` that something other than the delivery fills: see `lightbus.dependencies`."""

    __slots__ = ()


class Inbox(Protocol):
    """What `@app.on(inbox=...)` takes; see `lightbus.outbox.Inbox`."""

    def check(self, app: str, handler: Handler) -> None:
        """
        Raises:
            errors.InvalidHandler: it cannot run this handler; says why.
        """
        ...

    def injected(self, annotation: Any) -> Injected | None:
        """What fills a parameter with this annotation; None if the inbox does not."""
        ...

    def around(self, handler: Handler) -> Handler:
        """The handler within the inbox's transaction."""
        ...


@attrs.frozen(eq=False)
class Handler:
    """One `@app.on`."""

    name: str
    patterns: tuple[str, ...]
    source: str | None
    queue: str
    """The queue's suffix; `topology.MAIN` is the app's own queue."""
    retry: Retry
    timeout: float
    """Seconds."""
    concurrency: int | None
    """How many may run at once in one worker process; None leaves it to the worker."""
    function: Callable[..., Any]
    """The user's function."""
    is_async: bool
    """Whether it is awaited in the event loop. A sync function runs in a thread."""
    arguments: Callable[[Delivery], Arguments]
    """Fills the function's parameters from a delivery.

    Raises:
        errors.DecodeError: the delivery cannot be decoded as the annotated type.
    """
    middleware: tuple[Any, ...] = ()
    """`middleware.Middleware` for this handler only, the first one outermost. Inside of the app's."""
    parameters: tuple[inspect.Parameter, ...] = ()
    """The parameters that are filled, if dependencies fill some of them; `arguments` has the values of the others."""
    dependencies: Any = None
    """`dependencies.Dependencies`, which fill the other parameters; None where there are none."""
    inbox: Inbox | None = None
    """Runs the handler once per event: inside of the middleware, outside of the dependencies."""

    def matches(self, source: str, event: str) -> bool:
        return (self.source is None or self.source == source) and any(
            topic_matches(pattern, event) for pattern in self.patterns
        )


def build(
    app: str,
    function: Callable[..., Any],
    *,
    taken: Mapping[str, Handler],
    targets: Sequence[str | type[Any]],
    source: str | None,
    queue: str | None,
    retry: Retry | None,
    default_retry: Retry,
    timeout: float | timedelta | None,
    concurrency: int | None,
    name: str | None,
    local_names: Mapping[str, Any],
    middleware: Sequence[Any] = (),
    inbox: Inbox | None = None,
) -> Handler:
    """Check the arguments of `@app.on`, and resolve them.

    Args:
        taken: the app's other handlers, by name.
        local_names: the local variables of the function that calls `@app.on`, for annotations that are strings.
        middleware: `middleware.Middleware` objects for this handler only.

    Raises:
        errors.InvalidHandler, errors.InvalidName, errors.InvalidOption: see `Lightbus.on`.
    """
    own_name = check_name(name, function)
    owner = f"handler {own_name!r} of app {app!r}"
    if inbox is not None:
        _check_inbox(inbox, owner)
    if own_name in taken:
        raise errors.InvalidHandler(
            f"{owner}: a handler with this name already exists{_place(taken[own_name])}. Pass a different name=."
        )
    patterns = names_of(targets, owner)
    suffix = topology.MAIN if queue is None else topology.check_queue_suffix(queue, owner)
    own_source = None if source is None else topology.check_app_name(source)
    own_retry = default_retry if retry is None else check_retry(retry, owner)
    seconds = TIMEOUT if timeout is None else options.check_timeout(timeout, owner, LONGEST_TIMEOUT)
    at_once = None if concurrency is None else options.check_count(concurrency, owner, "concurrency", 10_000)
    arguments, parameters = read_signature(app, check_function(function, owner), owner, local_names, inbox)
    made = Handler(
        name=own_name,
        patterns=patterns,
        source=own_source,
        queue=suffix,
        retry=own_retry,
        timeout=seconds,
        concurrency=at_once,
        function=function,
        is_async=is_async(function),
        arguments=arguments,
        middleware=tuple(middleware),
        parameters=parameters,
        inbox=inbox,
    )
    if inbox is not None:
        inbox.check(app, made)
    return made


def _check_inbox(inbox: object, owner: str) -> None:
    """
    Raises:
        errors.InvalidOption: it is no inbox.
    """
    if isinstance(inbox, type) or not all(
        callable(getattr(inbox, one, None)) for one in ("check", "injected", "around")
    ):
        raise errors.InvalidOption(
            f"{owner}: inbox={inbox!r} is not an inbox. Pass a lightbus.outbox.Inbox, as in "
            "inbox = Inbox(app, sessions); @app.on(..., inbox=inbox)."
        )


def _place(other: Handler) -> str:
    module, name = (getattr(other.function, one, None) for one in ("__module__", "__qualname__"))
    return f" ({module}.{name})" if module and name else ""


def names_of(targets: Sequence[str | type[Any]], owner: str) -> tuple[str, ...]:
    """The patterns of the targets of `@app.on`: a string is a pattern, an event class stands for its name.

    Raises:
        errors.InvalidName, errors.InvalidHandler: neither a topic pattern nor an event class.
    """
    if not targets:
        raise errors.InvalidHandler(f"{owner}: name at least one event, as in @app.on('user.registered').")
    return tuple(dict.fromkeys(_name_of(target, owner) for target in targets))


def refuse_bare(targets: Sequence[object]) -> None:
    """
    Raises:
        errors.InvalidHandler: `@app.on` was used without parentheses, so that its only target is the function.
    """
    if len(targets) == 1 and callable(targets[0]) and not isinstance(targets[0], type):
        raise errors.InvalidHandler("@app.on needs an event's name, as in @app.on('user.registered').")


def _name_of(target: object, owner: str) -> str:
    if isinstance(target, type):
        event_type = event_type_of(target)
        if event_type is None:
            raise errors.InvalidHandler(
                f"{owner}: {target.__name__} is not an event class. "
                "Decorate it with @app.event, or give the event's name."
            )
        return event_type.name
    return topology.check_pattern(target, owner)


def check_name(name: object, function: Callable[..., Any]) -> str:
    """The handler's name: its `name=`, or the name of the function.

    Raises:
        errors.InvalidName: not a string of up to 255 printable characters. Retried copies have it in a header.
    """
    if name is None:
        name = getattr(function, "__name__", None) or type(function).__name__
    if not isinstance(name, str) or not 0 < len(name) <= 255 or not name.isprintable():
        raise errors.InvalidName(
            f"@app.on: name={name!r} is not a valid handler name. Use up to 255 printable characters."
        )
    return name


def check_retry(value: object, owner: str) -> Retry:
    if not isinstance(value, Retry):
        raise errors.InvalidOption(f"{owner}: retry={value!r}: use lightbus.Retry(delays=(1, 5, 30)) or Retry.none().")
    return value


# --- the signature ----------------------------------------------------------------------------


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(routine(function))


def routine(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that runs: the one within partials, or the `__call__` of an object."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def is_generator(function: Callable[..., Any]) -> bool:
    runs = routine(function)
    return inspect.isgeneratorfunction(runs) or inspect.isasyncgenfunction(runs)


def is_context_manager(function: Callable[..., Any]) -> bool:
    """Whether it is decorated with `@contextmanager` or `@asynccontextmanager`, so that it returns one, not entered."""
    return getattr(routine(function), "__code__", None) in _MAKE_CONTEXT_MANAGERS


_MAKE_CONTEXT_MANAGERS = [
    part
    for decorator in (contextlib.contextmanager, contextlib.asynccontextmanager)
    for part in decorator.__code__.co_consts
    if isinstance(part, types.CodeType)
]
"""The code of the functions that these decorators return. Others of contextlib's run the decorated function."""


def check_function(function: Callable[..., Any], owner: str) -> Callable[..., Any]:
    """
    Raises:
        errors.InvalidHandler: not callable, or a generator.
    """
    if isinstance(function, type) or not callable(function):
        raise errors.InvalidHandler(f"{owner} is not a function. Decorate a function, async or plain.")
    if is_generator(function):
        raise errors.InvalidHandler(
            f"{owner} is a generator, which Lightbus does not iterate. Return instead of yielding."
        )
    return function


def check_hook(
    function: Any, owner: str, what: str, arguments: Sequence[str], error_type: type[errors.DeclarationError]
) -> None:
    """
    Args:
        what: what takes the function, for the error: `on_publish`.
        arguments: what it is called with.

    Raises:
        errors.DeclarationError: of the given type, if it is not a sync function of these arguments.
    """
    if not callable(function) or is_async(function) or is_generator(function) or is_context_manager(function):
        raise error_type(f"{owner}: {what} takes a sync function ({', '.join(arguments)}), not {function!r}.")
    check_call(function, f"{owner}: {getattr(function, '__qualname__', function)}", arguments, error_type)


def check_call(
    function: Callable[..., Any], owner: str, arguments: Sequence[str], error_type: type[errors.DeclarationError]
) -> None:
    """
    Raises:
        errors.DeclarationError: of the given type, if the function cannot be called with these arguments. Some built-in
            functions do not tell what they take: these are not refused.
    """
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        count = "one argument" if len(arguments) == 1 else "two arguments"
        raise error_type(
            f"{owner} is called with {count}, ({', '.join(arguments)}), which it does not take ({error})."
        ) from error
    except ValueError:
        pass


def read_signature(
    app: str,
    function: Callable[..., Any],
    owner: str,
    local_names: Mapping[str, Any],
    inbox: Inbox | None = None,
) -> tuple[Callable[[Delivery], Arguments], tuple[inspect.Parameter, ...]]:
    """A function that fills the positional parameters from a delivery; and the filled parameters, if dependencies
    fill some of them.

    Raises:
        errors.InvalidHandler: a parameter cannot be filled; the message names it and the reason.
    """
    readers: list[Callable[[Delivery], Any]] = []
    payload: str | None = None
    left_out: str | None = None
    filled: list[inspect.Parameter] = []
    parameters = read_parameters(
        function, owner, local_names, "Take one payload parameter and, if needed, `message: Message`."
    )
    _refuse_unbound(parameters, owner)
    for parameter in parameters:
        marker = None if inbox is None else inbox.injected(parameter.annotation)
        if marker is not None:
            parameter = parameter.replace(annotation=typing.Annotated[parameter.annotation, marker])
        if injected(parameter, owner) is not None:
            filled.append(parameter)
        elif parameter.annotation is Message:
            if left_out is not None:
                raise errors.InvalidHandler(
                    f"{owner}: the parameter {parameter.name!r} comes after {left_out!r}, which keeps its default. "
                    "Put the envelope before it."
                )
            readers.append(functools.partial(codec.read_message, app))
            filled.append(parameter)
        elif parameter.default is not inspect.Parameter.empty:
            left_out = left_out or parameter.name
        elif payload is not None:
            raise errors.InvalidHandler(
                f"{owner}: the parameter {parameter.name!r} cannot be filled: {payload!r} is already the payload. "
                "Lightbus fills one payload (your own class with the fields you need, or dict), and the envelope as "
                "`message: Message`. Get everything else from a dependency (Annotated[Session, "
                "Depends(open_session)]) or inside the function, or give the parameter a default."
            )
        else:
            payload = parameter.name
            readers.append(_payload_reader(parameter, owner))
            filled.append(parameter)
    return _combine(readers), tuple(filled) if len(filled) > len(readers) else ()


def injected(parameter: inspect.Parameter, owner: str) -> Injected | None:
    """The marker of a parameter that a dependency fills: `Annotated[Session, Depends(open_session)]`.

    Raises:
        errors.InvalidHandler: there is a marker, but it is not where it belongs; the message says how to write it.
    """
    annotation, default = parameter.annotation, parameter.default
    right = (
        f"Write `{parameter.name}: Annotated[TheType, Depends(the_function)]`, or for the lifespan's value "
        f"`{parameter.name}: State[TheType]`"
    )
    for value, where in ((default, "its default"), (annotation, "its annotation")):
        if _is_marker(value):
            raise errors.InvalidHandler(
                f"{owner}: the parameter {parameter.name!r} has {value!r} as {where}. {right}, without a default: so "
                "type checkers know its type."
            )
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is not typing.Annotated:
        if any(_has_marker(one) for one in arguments):
            raise errors.InvalidHandler(
                f"{owner}: the parameter {parameter.name!r} has a marker inside of another type ({annotation}). Put "
                f"Annotated outside: `{parameter.name}: Annotated[TheType | None, Depends(the_function)]`."
            )
        return None
    markers = [one for one in arguments[1:] if _is_marker(one)]
    if not markers:
        return None
    if len(markers) > 1 or isinstance(markers[0], type):
        raise errors.InvalidHandler(
            f"{owner}: the parameter {parameter.name!r} needs one marker, not {', '.join(map(repr, markers))}. {right}."
        )
    if default is not inspect.Parameter.empty:
        raise errors.InvalidHandler(
            f"{owner}: the parameter {parameter.name!r} has a default ({default!r}) that is never used, because "
            f"{markers[0]!r} always fills it. Remove the default."
        )
    marker: Injected = markers[0]
    return marker


def _is_marker(value: object) -> bool:
    return isinstance(value, Injected) or (isinstance(value, type) and issubclass(value, Injected))


def _has_marker(annotation: object) -> bool:
    return _is_marker(annotation) or any(_has_marker(one) for one in typing.get_args(annotation))


def _refuse_unbound(parameters: Sequence[inspect.Parameter], owner: str) -> None:
    """
    Raises:
        errors.InvalidHandler: a method that was decorated in its class, where there is no instance yet.
    """
    if parameters and parameters[0].name == "self" and parameters[0].annotation is inspect.Parameter.empty:
        raise errors.InvalidHandler(
            f"{owner} is a method, but there is no instance to call it on. Decorate a function, or register the "
            "method of an instance: app.on('user.registered')(service.handle)."
        )


def _combine(readers: list[Callable[[Delivery], Any]]) -> Callable[[Delivery], Arguments]:
    if len(readers) == 1:  # the common case, without a loop per event
        (read,) = readers
        return lambda delivery: (read(delivery),)
    return lambda delivery: tuple(read(delivery) for read in readers)


def read_parameters(
    function: Callable[..., Any], owner: str, local_names: Mapping[str, Any], instead_of_stars: str
) -> list[inspect.Parameter]:
    """The parameters with their annotations resolved, without those keyword-only ones that keep their default.

    Args:
        instead_of_stars: what to do instead of `*args` and `**kwargs`, for the error.

    Raises:
        errors.InvalidHandler: the parameters cannot be read, or some can never be filled.
    """
    hints = _hints(function, owner, local_names)
    parameters: list[inspect.Parameter] = []
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise errors.InvalidHandler(
            f"{owner}: its parameters cannot be inspected ({error}). Wrap it in a function."
        ) from error
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise errors.InvalidHandler(
                f"{owner}: '{stars}{parameter.name}' cannot be filled. {_wrapper(function) or instead_of_stars}"
            )
        parameter = parameter.replace(annotation=hints.get(parameter.name, parameter.annotation))
        if parameter.kind is parameter.KEYWORD_ONLY and injected(parameter, owner) is None:
            if parameter.default is parameter.empty:
                raise errors.InvalidHandler(
                    f"{owner}: the keyword-only parameter {parameter.name!r} cannot be filled. "
                    "Put it before the '*', or give it a default."
                )
            continue
        parameters.append(parameter)
    return parameters


def _wrapper(function: Callable[..., Any]) -> str | None:
    """What is wrong, if the function is a wrapper that a decorator put around the handler."""
    code = getattr(function, "__code__", None)
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    wrapped = [one for one in inside if inspect.isroutine(one)]
    if code is None or not wrapped:
        return None
    return (
        f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno}) is a wrapper that a decorator made of "
        f"{wrapped[0].__name__!r}, and hides its parameters. Put @functools.wraps(...) above it, in the decorator."
    )


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # the variable is not set yet
        return False
    return True


def _hints(function: Callable[..., Any], owner: str, local_names: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if isinstance(function, type):
            wrapped = inspect.getattr_static(function, "__init__")
        else:
            wrapped = inspect.unwrap(routine(inspect.unwrap(function)))  # its signature counts
        return typing.get_type_hints(wrapped, localns=dict(local_names), include_extras=True)
    except NameError as error:
        raise errors.InvalidHandler(
            f"{owner}: an annotation cannot be resolved ({error}). Import or define the type at the top of the module "
            "(not under TYPE_CHECKING)."
        ) from error


def _payload_reader(parameter: inspect.Parameter, owner: str) -> Callable[[Delivery], Any]:
    wanted = parameter.annotation
    if wanted is parameter.empty:
        wanted = dict[str, Any]
    if Message in typing.get_args(wanted):
        raise errors.InvalidHandler(
            f"{owner}: the parameter '{parameter.name}: {_shown(wanted)}' is neither the payload nor exactly the "
            f"envelope. The envelope is never None: declare it as '{parameter.name}: Message'."
        )
    if pydantic_models.holds_model(wanted):
        return _model_reader(parameter, owner)
    try:
        info = msgspec.inspect.type_info(wanted)
        readable = unreadable_part(info)
    except KeyError as error:  # msgspec raises it for an attrs.field() without a type
        raise errors.InvalidHandler(
            f"{owner}: the parameter '{parameter.name}: {_shown(wanted)}' cannot be filled: "
            f"its field {error.args[0]!r} has no type. Annotate it, as in `{error.args[0]}: int`."
        ) from error
    except (TypeError, NameError) as error:
        raise errors.InvalidHandler(
            f"{owner}: the parameter '{parameter.name}: {wanted}' cannot be filled: {error}"
        ) from error
    if readable is not None:
        where, part = readable
        field = f" (its field {where} is a {part})" if where else ""
        if part.endswith(PYDANTIC):
            raise errors.InvalidHandler(
                f"{owner}: the parameter '{parameter.name}: {_shown(wanted)}' cannot be filled{field}: only a Pydantic "
                "model can have a Pydantic model as a part. Make the class of the parameter a Pydantic model too."
            )
        raise errors.InvalidHandler(
            f"{owner}: the parameter '{parameter.name}: {_shown(wanted)}' cannot be filled from JSON{field}. "
            "Annotate it with an attrs class, a dataclass, a msgspec.Struct, a Pydantic model, a TypedDict or dict; "
            "or the envelope with Message."
        )
    problem = lossy_part(info)
    if problem is not None:
        raise errors.InvalidHandler(
            f"{owner}: the parameter '{parameter.name}: {_shown(wanted)}' would not be filled as it is declared: "
            f"{problem}"
        )
    if _is_scalar(info):
        raise errors.InvalidHandler(
            f"{owner}: the parameter '{parameter.name}: {_shown(wanted)}' is a single value, but an event's payload "
            "is an object with fields. Annotate it with a class (or dict) that has the fields you need."
        )
    return codec.payload_reader(wanted)


def _model_reader(parameter: inspect.Parameter, owner: str) -> Callable[[Delivery], Any]:
    """For a Pydantic model, or a union or the like of some."""
    try:
        return codec.payload_reader(parameter.annotation)
    except TypeError as error:
        raise errors.InvalidHandler(
            f"{owner}: the parameter '{parameter.name}: {_shown(parameter.annotation)}' cannot be filled: {error}"
        ) from error


def _is_scalar(info: msgspec.inspect.Type) -> bool:
    if isinstance(info, msgspec.inspect.UnionType):
        return all(_is_scalar(one) for one in info.types)
    return isinstance(info, _SCALARS)


def _shown(annotation: Any) -> str:
    return pydantic_models.shown(annotation)


_SCALARS = (
    msgspec.inspect.NoneType,
    msgspec.inspect.BoolType,
    msgspec.inspect.IntType,
    msgspec.inspect.FloatType,
    msgspec.inspect.StrType,
    msgspec.inspect.BytesType,
    msgspec.inspect.ByteArrayType,
    msgspec.inspect.MemoryViewType,
    msgspec.inspect.DateTimeType,
    msgspec.inspect.DateType,
    msgspec.inspect.TimeType,
    msgspec.inspect.TimeDeltaType,
    msgspec.inspect.UUIDType,
    msgspec.inspect.DecimalType,
    msgspec.inspect.EnumType,
    msgspec.inspect.LiteralType,
)
