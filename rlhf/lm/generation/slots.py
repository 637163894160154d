"""The slot engine: continuous batching in the trainer's own process, on the trainer's own weights.

A slot is one row of a key-value cache. Each prompt is read once (`prefill`), up to its last token, straight into the
slots of its whole group; from there every slot takes one token per forward, the prompt's last one first. A slot whose
sequence ends is given to the next request at once, and without one left, the last slot is moved into it, so that a
forward is only ever about sequences that still run.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.generation.attention import LayerShape, attending, has_layers_of_8_bits, probe
from rlhf.lm.generation.casts import CAST_SHARE, CastWeights, cast_bytes, casts_change_nothing
from rlhf.lm.generation.decoding import Sampler, Workspace, decode_step
from rlhf.lm.generation.graphs import DecodeGraphs
from rlhf.lm.generation.memory import free_bytes, is_out_of_memory, plan_slots
from rlhf.lm.generation.protocol import Completions, Truncation
from rlhf.lm.generation.sampling import draw_uniforms
from rlhf.lm.generation.schedule import Admission, Requests, Schedule
from rlhf.lm.linear import packed, packed_bytes, sped_up

PREFILL_TOKENS = {"cpu": 2048, "cuda": 32768}  # in one forward, padding included
PACKED_STEPS = 32  # tokens of the longest completion; laying a matrix out costs as much as up to 20 products save
PACKED_SHARE = 0.125  # of the machine's memory that these copies may take
GRAPHS_ON = "cuda"


class SlotEngine:
    """Decodes with the model it was given, whose weights it reads live: nothing of a forward outlives a `generate`.

    Args:
        model: a causal language model that takes its attention from transformers' AttentionInterface; an adapter's
            wrapper is one too. A few tokens are run at once, to see that it does.
        eos_token_ids: tokens that end a completion.
        pad_token_id: fills finished rows.
        max_slots: sequences decoded at once, at most; fewer where memory is short. Changes no completion.
        autocast: makes the context of a forward (mixed precision as in training); none by default.
        use_graphs: on CUDA, run each decoding step as one CUDA graph, where the model's forward allows it:
            bitsandbytes' layers of 8 bits, among others, wait for the device.
        compile_step: on CUDA, compile the step before capturing it: tens of seconds that long runs earn back.
        keep_cache: hold the cache, and the graphs that point into it, between calls. None: on CUDA, while half of the
            device's memory is free beside it.
    Raises:
        InputError: the model's attention cannot be replaced.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: set[int],
        pad_token_id: int,
        max_slots: int = 256,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        use_graphs: bool = True,
        compile_step: bool = False,
        keep_cache: bool | None = None,
    ) -> None:
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.max_slots = max_slots
        self.autocast = autocast
        self.keep_cache = keep_cache
        self.slots = 0  # of the last call
        self._shapes: dict[Any, list[LayerShape]] = {}
        self._casts, self._may_cast = CastWeights(), dict[Any, bool]()
        self._workspace: Workspace | None = None
        self._graphs = DecodeGraphs(compile_step) if use_graphs and not has_layers_of_8_bits(model) else None
        with self.autocast():  # tried now: later the model's layers may be wrapped
            self._layer_shapes(model.device)
            self._cast_once(model.device)

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int | Tensor,
        temperature: float,
        seeds: Tensor | None,
        truncation: Truncation = Truncation(),  # noqa: B008 (frozen)
    ) -> Completions:
        """See `Engine.generate`.

        Raises:
            InputError: a prompt is empty or too long for the model, not even one sequence fits into memory, or the
                model's predictions are NaN.
        """
        requests = Requests.of(prompt_ids, prompt_mask, max_new_tokens)
        requests.check_fit(self.model.config)
        uniforms = None if seeds is None else draw_uniforms(seeds, max(requests.limits))
        try:
            completions = self._completed(requests, Sampler(uniforms, temperature, truncation), prompt_ids)
            completions.check_numbers()
        except BaseException:  # a cache that was left in the middle, or with NaN in it, is not used again
            self.release()
            raise
        if not self._keeps(prompt_ids.device):
            self.release()
        return completions

    def _completed(self, requests: Requests, sampler: Sampler, prompt_ids: Tensor) -> Completions:
        """All of them, in as many slots as there is memory for."""
        device = prompt_ids.device
        # inference_mode: no version counters and no views' bookkeeping, a fifth of a small model's forward
        with (
            torch.inference_mode(),
            self.autocast(),
            self._cast_once(device),
            self._at_full_speed(requests, device),
        ):
            shapes = self._layer_shapes(device)
            slots = plan_slots(
                shapes,
                columns=requests.columns,
                vocabulary=self._vocabulary,
                at_most=min(self.max_slots, len(requests.limits)),
                free=free_bytes(device) + self._held_bytes(),
            )
            run = None
            while run is None:
                run = self._attempt(slots, requests, sampler, shapes, device)
                if run is None:
                    slots = self._fewer(slots, requests.columns)
        self.slots = slots
        return self._collect(requests, run, prompt_ids)

    def release(self) -> None:
        """Free the cache, the graphs that point into it, and cast weights."""
        self._casts.clear()
        self._free_cache()

    # -- memory -----------------------------------------------------------------------------------------------------

    def _free_cache(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()
        self._workspace = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _attempt(
        self, slots: int, requests: Requests, sampler: Sampler, shapes: list[LayerShape], device: torch.device
    ) -> "_Run | None":
        """To the end, or None: memory ran out. Then nothing but `self` holds the cache, so that it can be let go."""
        workspace = self._take_workspace(slots, requests, shapes, device)
        if workspace is None:
            return None
        graphs = self._graphs if device.type == GRAPHS_ON else None
        run = _Run(self.model, workspace, graphs, requests, sampler, self.eos_token_ids)
        return run if run.attempt() else None

    def _fewer(self, slots: int, columns: int) -> int:
        """Half of the slots that were too many; their cache is let go."""
        had = slots if self._workspace is None else self._workspace.slots
        self._free_cache()
        if had == 1:
            raise InputError(
                f"out of memory while generating one sequence of {columns} tokens: shorten the prompts or pass a "
                "smaller --max-new-tokens"
            )
        return had // 2

    def _keeps(self, device: torch.device) -> bool:
        if self.keep_cache is not None or device.type != "cuda":
            return bool(self.keep_cache)
        return 2 * free_bytes(device) > torch.cuda.mem_get_info(device)[1]

    def _held_bytes(self) -> int:
        return 0 if self._workspace is None else self._workspace.cache_bytes

    def _take_workspace(
        self, slots: int, requests: Requests, shapes: list[LayerShape], device: torch.device
    ) -> Workspace | None:
        """The one kept, where it is large enough and not four times too large, or a new one; None: no memory."""
        results = len(requests.limits) * max(requests.limits)
        columns = requests.columns
        if device.type != "cuda":  # grows as sequences do
            columns = min(columns, max(map(len, requests.prompts)) + 32)
        if self._workspace is None or not self._workspace.fits(slots, columns, results, shapes):
            self._free_cache()
            try:
                self._workspace = Workspace(slots, columns, results, shapes, device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                return None
        return self._workspace

    def _cast_once(self, device: torch.device) -> AbstractContextManager[None]:
        """Within: what autocast would cast for every token has been, where that changes nothing and there is room."""
        if not torch.is_autocast_enabled(device.type):
            return nullcontext()
        dtype = torch.get_autocast_dtype(device.type)
        if (dtype, device) not in self._may_cast:
            self._may_cast[dtype, device] = casts_change_nothing(self.model, dtype, self._any_tokens(device))
        room = CAST_SHARE * (free_bytes(device) + self._casts.held_bytes)
        is_useful = self._may_cast[dtype, device] and cast_bytes(self.model, dtype) <= room
        return self._casts.in_place(self.model, dtype) if is_useful else nullcontext()

    @contextmanager
    def _at_full_speed(self, requests: Requests, device: torch.device) -> Iterator[None]:
        """Within: on a CPU, linear layers by the faster library, and matrices laid out once where that is repaid."""
        if device.type != "cpu":
            yield
            return
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.model.dtype
        # Not of what is free now: float32's last bits depend on it, and a run must be repeatable.
        has_room = packed_bytes(self.model, dtype) <= PACKED_SHARE * psutil.virtual_memory().total
        is_repaid = max(requests.limits) >= PACKED_STEPS
        with sped_up(self.model), packed(self.model) if has_room and is_repaid else nullcontext():
            yield

    def _layer_shapes(self, device: torch.device) -> list[LayerShape]:
        """Found by running a few tokens, any, once for each precision."""
        key = (self.model.dtype, torch.is_autocast_enabled(device.type), device)
        if key not in self._shapes:
            self._shapes[key] = probe(self.model, self._any_tokens(device))
        return self._shapes[key]

    def _any_tokens(self, device: torch.device) -> Tensor:
        return (torch.arange(8, device=device) % self._vocabulary)[None]

    @property
    def _vocabulary(self) -> int:
        return self.model.config.get_text_config(decoder=True).vocab_size

    def _collect(self, requests: Requests, run: "_Run", like: Tensor) -> Completions:
        """Results in the order and on the device of the requests, as ordinary tensors."""
        count, width, longest = len(requests.limits), max(requests.limits), max(run.lengths)
        lengths = torch.tensor(run.lengths, device=like.device)
        mask = torch.arange(longest, device=like.device) < lengths[:, None]

        def rows(flat: Tensor) -> Tensor:
            return flat[: count * width].view(count, width)[:, :longest]

        work = run.work
        raw = work.log_probs if run.sampler.truncation.is_off else work.untruncated_log_probs
        return Completions(
            token_ids=torch.where(mask, rows(work.token_ids), self.pad_token_id),
            sampler_log_probs=torch.where(mask, rows(work.log_probs), 0.0),
            untruncated_log_probs=torch.where(mask, rows(raw), 0.0),
            action_mask=mask,
            is_finished=torch.tensor(run.is_finished, device=like.device),
        )


class _Run:
    """One call: requests through the slots of a workspace."""

    def __init__(
        self,
        model: PreTrainedModel,
        work: Workspace,
        graphs: DecodeGraphs | None,
        requests: Requests,
        sampler: Sampler,
        eos: frozenset[int],
    ) -> None:
        self.model, self.work, self.graphs = model, work, graphs
        self.requests, self.sampler, self.eos = requests, sampler, eos
        self.schedule = Schedule(requests, work.slots)
        self.width = max(requests.limits)
        self.lengths = [0] * len(requests.limits)
        self.is_finished = [False] * len(requests.limits)
        self.device = work.state.device

    def attempt(self) -> bool:
        """To the end, or until memory runs out: False. What was made until then is lost, and would be made again."""
        if self.sampler.uniforms is not None:
            flat = self.sampler.uniforms.flatten()
            self.work.uniforms[: len(flat)].copy_(flat)
        try:
            with attending(self.model, self.work.attention):
                if self.graphs is not None:
                    self.graphs.begin(self.model, self.work)
                self._run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _run(self) -> None:
        schedule = self.schedule
        self._admit(schedule.admit())
        while schedule.running:
            if schedule.longest >= self.work.attention.columns:
                wanted = min(self.requests.columns, schedule.longest * 5 // 4 + 1)
                self.work.attention.grow(wanted)
            tokens = self._step(schedule.running, schedule.longest + 1)
            ended = schedule.advance(tokens, self.eos)
            if ended:
                self._retire(ended, tokens)

    def _retire(self, ended: list[int], tokens: list[int]) -> None:
        schedule = self.schedule
        for slot in ended:
            request = schedule.request_of[slot]
            self.lengths[request] = schedule.length_of(slot)
            self.is_finished[request] = tokens[slot] in self.eos
        schedule.free(ended)
        self._admit(schedule.admit())
        moves = schedule.compact()
        if moves:
            sources, targets = (torch.tensor(column, device=self.device) for column in zip(*moves, strict=True))
            self.work.attention.copy(sources, targets, schedule.longest)
            self.work.state[:, targets] = self.work.state[:, sources]
        if self.graphs is not None:
            self.graphs.idle(self.work, schedule.running)

    def _admit(self, admission: Admission) -> None:
        """Prompts into slots: copied where a slot holds them already, read where none does."""
        if not admission.slots:
            return
        requests, attention = self.requests, self.work.attention
        starts = []
        for slot in admission.slots:
            request = self.schedule.request_of[slot]
            prompt = requests.prompts[requests.prompt_of[request]]
            starts.append((prompt[-1], len(prompt) - 1, request * self.width))
        slots = torch.tensor(admission.slots, device=self.device)
        self.work.state[:, slots] = torch.tensor(starts, device=self.device).T
        self.work.advance[slots] = 1
        for prompt_index, source, targets in admission.copies:
            used = len(requests.prompts[prompt_index]) - 1
            origin = torch.full((len(targets),), source, device=self.device)
            attention.copy(origin, torch.tensor(targets, device=self.device), used)
        for group in requests.prefill_batches(list(admission.reads), PREFILL_TOKENS.get(self.device.type, 2048)):
            self._prefill([(requests.prompts[p][:-1], admission.reads[p]) for p in group])

    def _prefill(self, rows: list[tuple[list[int], list[int]]]) -> None:
        """Tokens into the slots that want them, right-padded; the logits are of no interest."""
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=self.device)
        targets = torch.tensor([slot for _, slots in rows for slot in slots], device=self.device)
        sources = torch.tensor([i for i, (_, slots) in enumerate(rows) for _ in slots], device=self.device)
        self.work.attention.prefill(targets, sources)
        positions = torch.arange(longest, device=self.device).expand(len(rows), -1)
        self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)

    def _step(self, running: int, used: int) -> list[int]:
        """One token for each of the first `running` slots; all of their columns are below `used`."""
        if self.graphs is not None:
            return self.graphs.step(self.model, self.work, self.sampler, running, used)
        return decode_step(self.model, self.work, self.sampler, running, used).tolist()
