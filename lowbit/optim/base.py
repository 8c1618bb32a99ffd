"""The optimizers' common part: torch.optim's interface over packed state."""

from __future__ import annotations

import contextlib
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import increment_version

from .. import memory
from . import clipping, state_dicts
from .packing import (
    DTYPES,
    Pack,
    StepInputs,
    block_starts,
    group_numbers,
    is_wrapper,
    operators,
    write_moment,
)
from .paging import POLICIES, Pager, make_pager

PAGING = ("auto", "managed", "pinned")


class PackedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is packed into slabs and stepped by few launches.

    Subclasses set `rule` ("adamw" or "lion"), `coded` (8-bit state) and `paged`.
    """

    rule: str
    coded = False
    paged = False

    # GradScaler then leaves found_inf and grad_scale here, instead of waiting for the device.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        defaults: dict,
        *,
        stochastic_rounding: bool,
        skip_nonfinite: bool,
        seed: int | None,
        paging: str = "auto",
        policy: str = "auto",
    ):
        if paging not in PAGING:
            raise ValueError(f"paging must be one of {', '.join(PAGING)}, got {paging!r}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if not self.paged and (paging, policy) != ("auto", "auto"):
            raise ValueError(
                f"paging and policy are for state that pages; {type(self).__name__}'s stays on the "
                "device"
            )
        _check_numbers(defaults)
        self.stochastic_rounding, self.skip_nonfinite = stochastic_rounding, skip_nonfinite
        if seed is None:
            if stochastic_rounding and _processes() > 1:
                raise ValueError(
                    "seed must be given, the same on all ranks, for stochastic_rounding in a group "
                    "of processes: each would round its copy of the parameters in another way"
                )
            seed = int.from_bytes(os.urandom(7), "little")
        if not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must be an integer of 64 bits, got {seed!r}")
        defaults["seed"] = int(seed)  # in the groups, so that a state dict carries it
        self._paging, self._policy = paging, policy
        self._pagers: dict[torch.device, Pager] = {}
        self._packs: list[Pack] = []
        self._waiting: list[torch.Tensor] = []  # parameters that never had a gradient
        self._members: list[list[torch.Tensor]] = []  # of each group, as this class knows them
        super().__init__(params, defaults)

    # ---- parameters ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_numbers(group)
            for parameter in group["params"]:
                if parameter.requires_grad:  # a frozen one may be of any kind: packed weights are
                    self._check_parameter(parameter)
        except Exception:
            self.param_groups.pop()
            raise
        self._waiting += group["params"]
        self._members.append(list(group["params"]))

    def _check_parameter(self, parameter: torch.Tensor) -> None:
        if is_wrapper(parameter):
            raise TypeError(
                f"{self._name(parameter)} must be an ordinary tensor, got a "
                f"{type(parameter).__name__}; FSDP2's are stepped by torch.optim's optimizers"
            )
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"{self._name(parameter)} must be float32, bfloat16 or float16, "
                f"got {_short(parameter.dtype)}"
            )
        if not parameter.is_contiguous():
            raise ValueError(f"{self._name(parameter)} must be contiguous, got strides "
                             f"{list(parameter.stride())}")  # fmt: skip

    def _name(self, parameter: torch.Tensor) -> str:
        """How messages call a parameter: its own name if the optimizer was given names."""
        for g, group in enumerate(self.param_groups):
            for i, other in enumerate(group["params"]):
                if other is parameter:
                    names = group.get("param_names")
                    where = f"parameter {i} of group {g}"
                    return f"{names[i]} ({where})" if names and i < len(names) else where
        return "a parameter"

    def _places(self) -> dict[torch.Tensor, tuple[int, int]]:
        """Each parameter's group, and its position among the elements of all parameters."""
        members = [(p, g) for g, group in enumerate(self.param_groups) for p in group["params"]]
        positions = block_starts([p.numel() for p, _ in members])
        return {p: (g, at) for (p, g), at in zip(members, positions, strict=True)}

    def _adopt(self, parameters: list[torch.Tensor]) -> list[Pack]:
        """Give parameters state, in new packs: one per device and dtype."""
        kinds: dict[tuple, list[torch.Tensor]] = {}
        for parameter in parameters:
            kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        places = self._places()
        packs = []
        for (device, _), members in kinds.items():
            at, pager = [places[p] for p in members], self._pager(device)
            with self._naming(members[0], "made, nothing was stepped"):
                packs.append(Pack(members, at, self.rule, self.coded, pager))
        self._packs += packs
        for pack in packs:
            self._show(pack)
        adopted = set(parameters)
        self._waiting = [p for p in self._waiting if p not in adopted]
        return packs

    def _show(self, pack: Pack) -> None:
        """Let self.state hold views of a pack's state."""
        for row, parameter in enumerate(pack.parameters):
            self.state[parameter].update(state_dicts.entry(pack, row))

    def _pager(self, device: torch.device) -> Pager:
        if device not in self._pagers:
            paging = self._paging if self.paged else None
            self._pagers[device] = make_pager(device, paging, self._policy)
        return self._pagers[device]

    # ---- step ------------------------------------------------------------------------------------

    @torch._disable_dynamo  # as torch.optim does: a compiled training step breaks its graph here
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss with gradients enabled; called first.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError, ValueError, TypeError: a gradient or parameter does not fit; the message
                names the parameter, and nothing has changed.
            lowbit.memory.PagedMemoryError: memory for state cannot be had or moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_members()
        for group in self.param_groups:
            _check_numbers(group)
        new = [p for p in self._waiting if p.grad is not None]
        for parameter in new:
            self._check_parameter(parameter)
            self._check_gradient(parameter, parameter.grad, parameter.numel())
        planned = self._planned(self._packs)  # all checks come before any new state
        if new:
            planned += self._planned(self._adopt(new))
        if planned:
            self._step_packs(planned)
        return loss

    def _check_members(self) -> None:
        """Refuse groups whose lists of parameters somebody has changed (accelerate does, for
        FSDP2): what was put in has no state here and would stay as it is, what was taken out would
        still be stepped.
        """
        groups = [group["params"] for group in self.param_groups]
        if len(groups) == len(self._members) and all(map(_same, groups, self._members)):
            return
        known = {p for members in self._members for p in members}
        for parameter in (p for members in groups for p in members if p not in known):
            if parameter.requires_grad:
                self._check_parameter(parameter)
            raise ValueError(
                f"{self._name(parameter)} was put into the group after the optimizer was made; "
                "make the optimizer anew, or use add_param_group"
            )
        raise ValueError(
            "parameters were taken out of the groups or moved in them after the optimizer was "
            "made; make the optimizer anew"
        )

    def _planned(self, packs: list[Pack]) -> list[tuple]:
        """(pack, slots, parameters, gradients, table) of the packs that have something to do."""
        groups, planned = group_numbers(self.param_groups), []
        for pack in packs:
            slots, parameters, grads = self._pairs(pack)
            if grads:
                table = self._checked_table(pack, slots, parameters, grads, groups)
                planned.append((pack, slots, parameters, grads, table))
        return planned

    def _step_packs(self, planned: list[tuple]) -> None:
        inputs = self._inputs([gradient for *_, grads, _ in planned for gradient in grads])
        ways = [self._begin(pack) for pack, *_ in planned]
        for (pack, slots, parameters, grads, table), how in zip(planned, ways, strict=True):
            if table is None:
                pack.plain_step(slots.tolist(), grads, self.param_groups, inputs)
            else:
                pack.step(table, how, inputs)
                increment_version(parameters)  # kernels that get addresses leave that to us

    def _begin(self, pack: Pack) -> str:
        first = next((slab.first for slab in pack.slabs if slab.on_host), 0)
        with self._naming(pack.parameters[first], "moved, nothing was stepped"):
            return pack.pager.begin(pack.slabs)

    @contextlib.contextmanager
    def _naming(self, parameter: torch.Tensor, what: str) -> Iterator[None]:
        """Say whose state it is that memory could not be had for, or could not be moved."""
        try:
            yield
        except memory.PagedMemoryError as error:
            raise memory.PagedMemoryError(
                f"the state of {self._name(parameter)} and what lies with it cannot be {what}: "
                f"{error}"
            ) from error

    @staticmethod
    def _pairs(pack: Pack) -> tuple[torch.Tensor, list, list]:
        """Rows of the pack that have a gradient, their parameters and their gradients."""
        grads = [p.grad for p in pack.parameters]
        if all(g is not None for g in grads):
            return pack.every_slot, pack.parameters, grads
        slots = [i for i, g in enumerate(grads) if g is not None]
        rows = torch.tensor(slots, dtype=torch.int64, device="cpu")
        return rows, [pack.parameters[i] for i in slots], [grads[i] for i in slots]

    def _checked_table(self, pack, slots, parameters, grads, groups):
        """The step's table, None for the plain path; raises if a pair does not fit."""
        if operators(pack.device) is None:
            for slot, p, g in zip(slots.tolist(), parameters, grads, strict=True):
                self._check_gradient(p, g, pack.layout.counts[slot])
            return None
        try:
            table, bad = pack.table(slots, parameters, grads, groups)
        except RuntimeError:  # no operator takes sparse gradients; asking each costs every step
            for p, g in zip(parameters, grads, strict=True):
                self._check_gradient(p, g, p.numel())
            raise
        if bad >= 0:
            for i, slot in enumerate(slots.tolist()):
                self._check_gradient(parameters[i], grads[i], pack.layout.counts[slot])
                grads[i] = grads[i].contiguous()
            table, bad = pack.table(slots, parameters, grads, groups)
        if bad >= 0:
            raise RuntimeError(f"{self._name(parameters[bad])} or its gradient cannot be stepped")
        return table

    def _check_gradient(self, p: torch.Tensor, g: torch.Tensor, count: int) -> None:
        """Raise if parameter and gradient do not belong together, or the parameter has changed."""
        if g.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of {self._name(p)} is sparse ({g.layout}); "
                f"{type(self).__name__} needs dense gradients"
            )
        if p.numel() != count:
            raise RuntimeError(
                f"{self._name(p)} had {count} elements when its state was made and has "
                f"{p.numel()} now; was its memory freed?"
            )
        if not p.is_contiguous():
            raise ValueError(f"{self._name(p)} must be contiguous, got strides {list(p.stride())}")
        for what, of_g, of_p in (
            ("dtype", _short(g.dtype), _short(p.dtype)),
            ("device", g.device, p.device),
            ("shape", list(g.shape), list(p.shape)),
        ):
            if of_g != of_p:
                raise RuntimeError(
                    f"the gradient of {self._name(p)} must have the parameter's {what} {of_p}, "
                    f"got {of_g}"
                )
        for what, tensor in (("the gradient of ", g), ("", p)):
            if tensor.numel() and not tensor.untyped_storage().nbytes():
                raise RuntimeError(f"the memory of {what}{self._name(p)} was freed")
        pack = self._pack_of(p)
        if pack is not None and (p.device, p.dtype) != (pack.device, pack.dtype):
            raise RuntimeError(
                f"{self._name(p)} was {_short(pack.dtype)} on {pack.device} when its state was "
                f"made and is {_short(p.dtype)} on {p.device} now; make a new optimizer and load "
                "the state_dict of this one"
            )

    def _pack_of(self, parameter: torch.Tensor) -> Pack | None:
        return next((k for k in self._packs if any(q is parameter for q in k.parameters)), None)

    def _inputs(self, gradients: list[torch.Tensor]) -> StepInputs:
        found_inf = getattr(self, "found_inf", None)
        if self.skip_nonfinite:
            flag = clipping.found_nonfinite(gradients)
            found_inf = (
                flag if found_inf is None else torch.maximum(flag, found_inf.to(flag.device))
            )
        return StepInputs(
            found_inf,
            getattr(self, "grad_scale", None),
            self.stochastic_rounding,
            self.param_groups[0]["seed"],
        )

    # ---- paging ----------------------------------------------------------------------------------

    def evict(self, release: bool = False) -> None:
        """Move all paged state to the host. The next step may bring it back.

        Args:
            release: give the card's memory back at once. Otherwise the move is only queued, and the
                driver keeps the pages for whoever asks for memory next, so that mem_get_info does
                not show them as free. Releasing waits for the device and makes new tensors: state
                held from outside of the optimizer stays behind.
        """
        for pack in self._packs:
            try:
                with self._naming(pack.parameters[0], "moved to the host"):
                    (pack.pager.release if release else pack.pager.evict)(pack.slabs)
            finally:
                if release:  # whatever was released before an error has new tensors
                    self._show(pack)

    def bring_back(self) -> None:
        """Queue the move of all paged state to the device."""
        for pack in self._packs:
            with self._naming(pack.parameters[0], "moved to the device"):
                pack.pager.bring_back(pack.slabs)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of state on the "device" and on the "host", by where lowbit last put them."""
        slabs = [slab for pack in self._packs for slab in pack.slabs]
        host = sum(s.nbytes for s in slabs if s.on_host)
        return {"device": sum(s.nbytes for s in slabs) - host, "host": host}

    # ---- state dicts -----------------------------------------------------------------------------

    def torch_state_dict(self) -> dict:
        """state_dict() with fp32 moments, for torch.optim.AdamW.load_state_dict."""
        return state_dicts.with_float_moments(self.state_dict(), self.rule)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of this optimizer, of torch.optim.AdamW or of bitsandbytes.

        fp32 and 8-bit state are converted to what this optimizer keeps; 8-bit to 8-bit keeps every
        byte. State is paged again, wherever the loaded tensors lie.

        Raises:
            ValueError: groups or shapes differ, or the state is another kind of optimizer's;
                nothing has changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups, loaded = state_dicts.parse(state_dict, self.param_groups, self.rule, self._name)
        self._replace_state(loaded)
        for group, new in zip(self.param_groups, groups, strict=True):
            group.update(new)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @torch.no_grad()
    def _replace_state(self, loaded: dict[torch.Tensor, state_dicts.Loaded]) -> None:
        if set(loaded) != {p for pack in self._packs for p in pack.parameters}:
            self.state.clear()
            self._packs = []
            self._members = [list(group["params"]) for group in self.param_groups]
            self._waiting = [p for members in self._members for p in members]
            self._adopt(list(loaded))
        for pack in self._packs:
            steps = [loaded[p].step for p in pack.parameters]
            pack.steps.copy_(torch.tensor(steps, dtype=torch.float32, device="cpu"))
            for row, parameter in enumerate(pack.parameters):
                for state, view in enumerate(pack.moments(row)):
                    loaded[parameter].write(state, view, write_moment)

    def __getstate__(self) -> dict:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied; save its state_dict() and load it "
            "into a new optimizer"
        )


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether two lists hold the same objects; == would compare their elements."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _processes() -> int:
    """Processes of the default group of torch.distributed."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_numbers(group: dict) -> None:
    """torch.optim.AdamW's checks of a group's hyperparameters."""
    lr, betas = group["lr"], group["betas"]
    eps, weight_decay = group.get("eps", 0.0), group["weight_decay"]
    try:
        if not lr >= 0.0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if not eps >= 0.0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    except TypeError:
        raise TypeError(
            "lr, eps and weight_decay must be numbers and betas two, got "
            f"{lr!r}, {eps!r}, {weight_decay!r} and {betas!r}"
        ) from None
    if group.get("amsgrad"):
        raise ValueError("amsgrad is not offered: it keeps a third state; use torch.optim.AdamW")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
