"""Dependencies of handlers: `Annotated[Session, Depends(open_session)]`, and the lifespan's value: `State[Pool]`.

They are resolved once, at registration: `Dependencies` compiles a handler's dependencies to a plan, a list of steps in
the order in which they run. An event runs the steps, the handler, and then the tear-downs in reverse order.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import anyio
import anyio.lowlevel
import attrs

from lightbus import errors
from lightbus.handler import Handler, Injected, injected, is_async, is_context_manager, read_parameters, routine
from lightbus.message import Message
from lightbus.middleware import the_delivery
from lightbus.transport import Delivery
from lightbus.wire import codec

States = list[list[Any]]
"""What lifespans that run now have yielded, each in a list of one."""
Key = Any
"""What makes two dependencies the same one: the function, where it can be hashed."""


class Depends(Injected):
    """Fill a parameter with what a function returns or a generator yields: `Annotated[Session, Depends(open_session)]`.

    For each event, a dependency is made once, however often it is asked for. A generator's code after its `yield` runs
    when the handler has ended, before the ack; the handler's error is raised at its `yield`. A dependency's own
    parameters may be other dependencies, the `Message`, and the lifespan's value (`State`).

    Async handlers have async or sync dependencies; a sync one runs in the event loop, and must not block. Sync handlers
    have sync dependencies, which run in the handler's thread.

    Raises:
        errors.InvalidDependency: not a function, generator function or class.
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any], /) -> None:
        given: Any = function
        if isinstance(given, types.CoroutineType | types.GeneratorType | types.AsyncGeneratorType):
            name = given.__qualname__
            if isinstance(given, types.CoroutineType):
                given.close()
            raise errors.InvalidDependency(
                f"Depends({name}(...)): pass the function without calling it, as in Depends({name})."
            )
        if not callable(function):
            raise errors.InvalidDependency(
                f"Depends({function!r}): pass a function that returns the value, or a generator function that yields "
                "it, as in Depends(open_session)."
            )
        self.function = function

    def __repr__(self) -> str:
        return f"Depends({name_of(self.function)})"


class _Lifespan(Injected):
    """The marker of `State`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "State"


LIFESPAN: Final = _Lifespan()

if TYPE_CHECKING:
    T = TypeVar("T")
    State = Annotated[T, LIFESPAN]
else:

    class State(Injected):
        """Fill a parameter with what the app's `lifespan` has yielded: `pool: State[Pool]`.

        Type checkers read `State[Pool]` as `Pool`. Outside of handlers and dependencies: `app.state`.
        """

        def __class_getitem__(cls, wanted: Any) -> Any:
            return Annotated[wanted, LIFESPAN]


def current_state(app: str, states: States) -> Any:
    """
    Raises:
        errors.NoState: there is none.
    """
    if not states:
        raise errors.NoState(
            f"app {app!r} has no state: no worker of it runs in this process with a lifespan. Pass lifespan= to "
            "Lightbus(...); in a test without the lifespan, use `with app.with_state(value):`."
        )
    value = states[-1][0]
    if value is None:
        raise errors.NoState(
            f"app {app!r} has no state: its lifespan yields nothing. Yield the value, as in `yield pool`."
        )
    return value


def name_of(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return f"partial({name_of(function.func)})"
    name: str = getattr(function, "__qualname__", None) or type(function).__qualname__
    return name.rpartition("<locals>.")[2]


def key_of(function: Callable[..., Any]) -> Key:
    try:
        hash(function)
    except TypeError:
        return id(function)
    return function


def check_override(
    app: str, dependencies: Sequence[Dependencies], original: Callable[..., Any], replacement: Callable[..., Any]
) -> Key:
    """
    Raises:
        errors.InvalidDependency: no handler asks for the original, or the replacement is not a function.
    """
    if not callable(replacement):
        raise errors.InvalidDependency(
            f"app {app!r}: override({_shown(original)}, {replacement!r}): the replacement is not a function. Pass one "
            "that returns it, as in `lambda: fake`."
        )
    if not any(one.asks_for(original) for one in dependencies):
        names = sorted({name for one in dependencies for name in one.names()})
        raise errors.InvalidDependency(
            f"app {app!r}: override({_shown(original)}, ...): no handler depends on it. "
            + (f"Handlers depend on: {', '.join(names)}." if names else "No handler has dependencies.")
        )
    return key_of(original)


def _shown(function: Any) -> str:
    return name_of(function) if callable(function) else repr(function)


# --- the plan ---------------------------------------------------------------------------------


class Kind(enum.Enum):
    """What calling a step's function gives."""

    VALUE = enum.auto()
    """The value, of the message or the lifespan."""
    FUNCTION = enum.auto()
    """The value, or by mistake something unfinished."""
    COROUTINE = enum.auto()
    GENERATOR = enum.auto()
    ASYNC_GENERATOR = enum.auto()


Values = list[Any]
"""Of one event: the delivery, the arguments that it fills, and what each step so far has made."""


@attrs.frozen(eq=False)
class Step:
    """One dependency."""

    owner: str
    """For errors."""
    kind: Kind
    make: Callable[[Values], Any]
    """Calls the dependency's function."""


@attrs.frozen(eq=False)
class Plan:
    """What an event runs: the steps in this order, then the handler."""

    steps: tuple[Step, ...]
    call: Callable[[Values], Any]
    """Calls the handler's function."""
    functions: Mapping[Key, Callable[..., Any]]
    """Of all dependencies, before overrides."""
    reads_state: bool


class _Compiler:
    """Compiles the dependencies of one handler to a plan."""

    def __init__(
        self,
        app: str,
        handler: Handler,
        states: States,
        signatures: dict[Key, list[inspect.Parameter]],
        *,
        local_names: Mapping[str, Any],
        replaced: Mapping[Key, Callable[..., Any]],
    ) -> None:
        """
        Args:
            signatures: the parameters of each function that was read already.
            local_names: for annotations that are strings.
            replaced: what to use instead of some dependencies.
        """
        self._app = app
        self._owner = f"handler {handler.name!r} of app {app!r}"
        self._handler = handler
        self._states = states
        self._signatures = signatures
        self._local_names = local_names
        self._replaced = replaced
        self._steps: list[Step] = []
        self._places: dict[Key, int] = {}
        """Where in `Values` each dependency's value is."""
        self._functions: dict[Key, Callable[..., Any]] = {}
        self._path: list[Key] = []
        """The dependencies that are being compiled, each one asked for by the one before it."""
        self._arguments = 1
        """Values before those of the steps."""

    def compile(self) -> Plan:
        own: dict[str, int] = {}
        for parameter in self._handler.parameters:
            if injected(parameter, self._owner) is None:
                own[parameter.name] = self._arguments
                if parameter.annotation is Message:
                    self._places[Message] = self._arguments
                self._arguments += 1
        places: list[tuple[inspect.Parameter, int]] = []
        for parameter in self._handler.parameters:
            place = own.get(parameter.name)
            places.append((parameter, self._place_of(parameter, self._owner) if place is None else place))
        call = _caller(self._handler.function, places)
        return Plan(tuple(self._steps), call, self._functions, reads_state=LIFESPAN in self._places)

    def _place_of(self, parameter: inspect.Parameter, owner: str) -> int:
        marker = injected(parameter, owner)
        app, states = self._app, self._states
        if isinstance(marker, Depends):
            return self._dependency(marker.function)
        if marker is LIFESPAN:
            return self._value(LIFESPAN, lambda values: current_state(app, states))
        return self._value(Message, lambda values: codec.message_of(app, values[0]))

    def _value(self, key: Key, make: Callable[[Values], Any]) -> int:
        return self._places[key] if key in self._places else self._add(key, Step(self._owner, Kind.VALUE, make))

    def _add(self, key: Key, step: Step) -> int:
        self._places[key] = place = self._arguments + len(self._steps)
        self._steps.append(step)
        return place

    def _dependency(self, original: Callable[..., Any]) -> int:
        key = key_of(original)
        if key in self._places:
            return self._places[key]
        self._functions[key] = original
        owner = f"{self._owner}: dependency {name_of(original)}"
        if key in self._path:
            cycle = [self._functions[one] for one in (*self._path[self._path.index(key) :], key)]
            raise errors.InvalidDependency(
                f"{owner} depends on itself: {' -> '.join(map(name_of, cycle))}. Move what both need into a third one."
            )
        function = self._replaced.get(key, original)
        if function is not original:
            owner += f" (overridden by {name_of(function)})"
        kind = _kind(function, owner)
        if not self._handler.is_async and kind in (Kind.COROUTINE, Kind.ASYNC_GENERATOR):
            raise errors.InvalidDependency(
                f"{owner} is async, but the handler is a sync function, which runs in a thread. Make the handler "
                "`async def`, or the dependency `def`."
            )
        self._path.append(key)
        places = self._parameters(function, owner)
        self._path.pop()
        return self._add(key, Step(owner, kind, _caller(function, places)))

    def _parameters(self, function: Callable[..., Any], owner: str) -> list[tuple[inspect.Parameter, int]]:
        filled: list[tuple[inspect.Parameter, int]] = []
        left_out = False
        for parameter in self._signature(function, owner):
            if injected(parameter, owner) is None and parameter.annotation is not Message:
                if parameter.default is inspect.Parameter.empty:
                    raise errors.InvalidDependency(f"{owner}: {_why_not_filled(parameter)}")
                left_out = True
                continue
            if left_out and parameter.kind is parameter.POSITIONAL_ONLY:
                raise errors.InvalidDependency(
                    f"{owner}: the parameter {parameter.name!r} comes after one that keeps its default. Put it first."
                )
            if left_out:
                parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
            filled.append((parameter, self._place_of(parameter, owner)))
        return filled

    def _signature(self, function: Callable[..., Any], owner: str) -> list[inspect.Parameter]:
        key = key_of(function)
        if key not in self._signatures:
            try:
                self._signatures[key] = read_parameters(
                    function,
                    owner,
                    self._local_names,
                    "Name its parameters, and annotate each; or wrap it in a function.",
                )
            except errors.InvalidHandler as error:
                raise errors.InvalidDependency(str(error)) from error.__cause__
        return self._signatures[key]


def _why_not_filled(parameter: inspect.Parameter) -> str:
    if parameter.name == "self" and parameter.annotation is parameter.empty:
        return "it is a method without its instance. Pass the method of an instance: Depends(sessions.open)."
    if parameter.annotation is parameter.empty:
        what = f"the parameter {parameter.name!r} has no annotation"
    else:
        shown = parameter.annotation
        shown = shown.__name__ if isinstance(shown, type) else shown
        what = f"the parameter '{parameter.name}: {shown}' cannot be filled"
    return (
        f"{what}. A dependency can have other dependencies (Annotated[..., Depends(...)]), the envelope "
        "(message: Message), the lifespan's value (State[...]), and parameters with a default. Only the handler gets "
        "the payload."
    )


def _kind(function: Callable[..., Any], owner: str) -> Kind:
    if isinstance(function, type):
        return Kind.FUNCTION
    runs = routine(function)
    if inspect.isasyncgenfunction(runs):
        return Kind.ASYNC_GENERATOR
    if inspect.isgeneratorfunction(runs):
        return Kind.GENERATOR
    if is_async(function):
        return Kind.COROUTINE
    if is_context_manager(function):
        raise errors.InvalidDependency(
            f"{owner} is decorated with @contextmanager or @asynccontextmanager, so the handler would get the context "
            "manager, not entered. Remove the decorator: Depends takes the generator function itself."
        )
    return Kind.FUNCTION


def _caller(function: Callable[..., Any], places: Sequence[tuple[inspect.Parameter, int]]) -> Callable[[Values], Any]:
    """A function that calls this one with the values at these places."""
    positional = [place for parameter, place in places if parameter.kind is not parameter.KEYWORD_ONLY]
    named = [(parameter.name, place) for parameter, place in places if parameter.kind is parameter.KEYWORD_ONLY]
    if named:
        return lambda values: function(
            *[values[place] for place in positional], **{name: values[place] for name, place in named}
        )
    match positional:
        case []:
            return lambda values: function()
        case [only]:
            return lambda values: function(values[only])
        case [first, second]:
            return lambda values: function(values[first], values[second])
        case _:
            return lambda values: function(*[values[place] for place in positional])


# --- one event --------------------------------------------------------------------------------


class Dependencies:
    """The dependencies of one handler, which run around it."""

    def __init__(self, app: str, handler: Handler, states: States, local_names: Mapping[str, Any]) -> None:
        """
        Raises:
            errors.InvalidDependency: one cannot be used; the message names it and why.
        """
        # Without the local names, which would keep the variables of the caller of `@app.on` alive.
        self._compiler = functools.partial(_Compiler, app, handler, states)
        self._signatures: dict[Key, list[inspect.Parameter]] = {}
        self._owner = f"handler {handler.name!r} of app {app!r}"
        self._arguments = handler.arguments
        self._states = states
        self._declared = self._plan = self._compiler(self._signatures, local_names=local_names, replaced={}).compile()

    def use(self, replaced: Mapping[Key, Callable[..., Any]]) -> None:
        """From the next event on, run these instead of the dependencies that they replace.

        Raises:
            errors.InvalidDependency: a replacement cannot be used. Then nothing has changed.
        """
        if any(key in self._declared.functions for key in replaced):
            signatures = self._signatures.copy()  # those of the replacements are not kept
            self._plan = self._compiler(signatures, local_names={}, replaced=replaced).compile()
        else:
            self._plan = self._declared

    def asks_for(self, function: Callable[..., Any]) -> bool:
        return key_of(function) in self._declared.functions

    def names(self) -> list[str]:
        return [name_of(function) for function in self._declared.functions.values()]

    def check_state(self, *, has_lifespan: bool) -> None:
        """
        Raises:
            errors.InvalidDependency: the lifespan's value is asked for, and there is no lifespan.
        """
        if self._plan.reads_state and not has_lifespan and not self._states:
            raise errors.InvalidDependency(
                f"{self._owner} asks for the lifespan's value (State[...]), but the app has no lifespan. Pass one that "
                "yields the value: Lightbus(..., lifespan=...)."
            )

    def around(self, handler: Handler) -> Handler:
        """The handler with its dependencies."""
        function = self._run if handler.is_async else self._run_sync
        return attrs.evolve(handler, function=function, arguments=the_delivery)

    async def _run(self, delivery: Delivery) -> None:
        plan = self._plan
        values: Values = [delivery, *self._arguments(delivery)]
        opened: list[tuple[Step, Any]] = []
        failure: BaseException | None = None
        try:
            for step in plan.steps:
                value = step.make(values)
                match step.kind:
                    case Kind.ASYNC_GENERATOR:
                        generator = value
                        try:
                            value = await generator.__anext__()
                        except StopAsyncIteration:
                            raise _never_yielded(step) from None
                        opened.append((step, generator))
                    case Kind.COROUTINE:
                        value = await value
                    case Kind.GENERATOR:
                        generator, value = value, _first(step, value)
                        opened.append((step, generator))
                    case Kind.FUNCTION if type(value) in _UNFINISHED:
                        raise _unfinished(step, value)
                    case _:
                        pass
                values.append(value)
            await plan.call(values)
        except BaseException as error:  # noqa: BLE001  # raised below, after the tear-downs
            failure = error
            if opened and not isinstance(error, (Exception, GeneratorExit, KeyboardInterrupt, SystemExit)):
                await let_cancellation_pass()
        while opened:
            step, generator = opened.pop()
            if step.kind is Kind.ASYNC_GENERATOR:
                failure = await _tear_down(step, generator, failure)
            else:
                failure = _tear_down_sync(step, generator, failure)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # else the error and this frame would refer to each other

    def _run_sync(self, delivery: Delivery) -> None:
        plan = self._plan
        values: Values = [delivery, *self._arguments(delivery)]
        opened: list[tuple[Step, Any]] = []
        failure: BaseException | None = None
        try:
            for step in plan.steps:
                value = step.make(values)
                if step.kind is Kind.GENERATOR:
                    generator, value = value, _first(step, value)
                    opened.append((step, generator))
                elif type(value) in _UNFINISHED and step.kind is Kind.FUNCTION:
                    raise _unfinished(step, value)
                values.append(value)
            returned = plan.call(values)
            if returned is not None and inspect.isawaitable(returned):
                raise _awaitable(self._owner, returned)
        except BaseException as error:  # noqa: BLE001  # raised below, after the tear-downs
            failure = error
        while opened:
            failure = _tear_down_sync(*opened.pop(), failure)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure


def _first(step: Step, generator: Any) -> Any:
    try:
        return next(generator)
    except StopIteration:
        raise _never_yielded(step) from None


async def let_cancellation_pass() -> None:
    """Let the worker stop cancelling a handler that exceeded its timeout, so that its tear-downs can await.

    It cancels a handler for one round of the event loop (see `consuming.timeouts`).
    """
    with anyio.CancelScope(shield=True):
        for _ in range(2):
            with contextlib.suppress(anyio.get_cancelled_exc_class()):
                await anyio.lowlevel.checkpoint()


async def _tear_down(step: Step, generator: Any, error: BaseException | None) -> BaseException | None:
    """Run what follows the generator's `yield`. Returns the error of the handler run, with this tear-down.

    An error stays one, though the generator handles it: otherwise a dependency could make a failed event count as
    handled. It may raise another error.
    """
    trace = None if error is None else error.__traceback__
    try:
        if error is None:
            await generator.__anext__()
        else:
            await generator.athrow(error)
    except StopAsyncIteration:
        return error
    except BaseException as raised:  # noqa: BLE001  # the caller raises it
        return _after(error, raised, trace)
    try:
        await generator.aclose()
    except Exception as raised:  # noqa: BLE001
        return _yielded_again(step, error, raised)
    return _yielded_again(step, error)


def _tear_down_sync(step: Step, generator: Any, error: BaseException | None) -> BaseException | None:
    trace = None if error is None else error.__traceback__
    try:
        if error is None:
            next(generator)
        else:
            generator.throw(error)
    except StopIteration:
        return error
    except BaseException as raised:  # noqa: BLE001  # the caller raises it
        return _after(error, raised, trace)
    try:
        generator.close()
    except Exception as raised:  # noqa: BLE001
        return _yielded_again(step, error, raised)
    return _yielded_again(step, error)


def _after(error: BaseException | None, raised: BaseException, trace: types.TracebackType | None) -> BaseException:
    """The error of the run, after a tear-down has raised one."""
    # Python turns a StopIteration that leaves a generator into a RuntimeError.
    if error is not None and (raised is error or (raised.__cause__ is error and isinstance(error, _STOPS))):
        return error.with_traceback(trace)  # without the frames of the generators that it went through
    return raised


_STOPS = (StopIteration, StopAsyncIteration)
_UNFINISHED = frozenset((types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType))
"""What a dependency's function returns by mistake."""


def _never_yielded(step: Step) -> errors.DependencyError:
    return errors.DependencyError(f"{step.owner} returned without yielding. It must yield the value, once.")


def _yielded_again(step: Step, error: BaseException | None, raised: Exception | None = None) -> BaseException:
    text = f"{step.owner} yielded more than once. It must yield the value once, and then end."
    if error is None:
        again = errors.DependencyError(text)
        again.__cause__ = raised
        return again
    error.add_note(text)
    return error


def _unfinished(step: Step, value: Any) -> errors.DependencyError:
    if isinstance(value, types.CoroutineType):
        value.close()
    return errors.DependencyError(
        f"{step.owner} is a sync function that returned {_articled(value)}. Make it `async def` or a generator "
        "itself; if a decorator hides that, make its wrapper one too."
    )


def _articled(value: Any) -> str:
    match value:
        case types.CoroutineType():
            return "a coroutine"
        case types.GeneratorType():
            return "a generator"
        case _:
            return "an async generator"


def _awaitable(owner: str, returned: Any) -> errors.DependencyError:
    if inspect.iscoroutine(returned):
        returned.close()
    return errors.DependencyError(
        f"{owner} is a sync function that returned an awaitable, which its dependencies cannot wrap. Make it "
        "`async def`; if a decorator hides that, make its wrapper `async def` too."
    )
