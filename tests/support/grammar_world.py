"""An engine whose requests have grammars: a device that samples in two phases, and compilers."""

from __future__ import annotations

import threading

from xgrammar import CompiledGrammar, GrammarCompiler, TokenizerInfo, VocabType

from phloem.shared.engine.grammar.compiler_main import compile_grammar
from phloem.shared.engine.grammar.desk import GrammarDesk, GrammarReady
from phloem.shared.engine.grammar.masks import MaskFiller, TokenMasks
from phloem.shared.engine.grammar.parts import GrammarParts
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.engine.step_runner import LayerWatch
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import Grammar
from tests.support.engine_world import EOS, EngineWorld, FakeDevice, FakeStep

VOCAB = 97  # token t > 0 stands for the character 31 + t


DEADLINE_S = 60.0


class LocalCompiler:
    """In this process; counts."""

    def __init__(self) -> None:
        tokens = ["", *(chr(31 + token) for token in range(1, VOCAB))]
        info = TokenizerInfo(tokens, VocabType.RAW, vocab_size=VOCAB, stop_token_ids=[EOS])
        self._compiler = GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.num_compiled = 0
        self.closed = False

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        self.num_compiled += 1
        try:
            return compile_grammar(self._compiler, grammar)
        except RuntimeError as error:
            raise PhloemError("bad_grammar", str(error), http_status=400) from error

    def close(self) -> None:
        self.closed = True


class FailingCompiler(LocalCompiler):
    """Breaks in a way that nobody has foreseen."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        if not self.num_compiled:
            self.num_compiled += 1
            raise AssertionError("out of step")
        return super().compile(grammar)


class SlowCompiler(LocalCompiler):
    """Compiles when the test says so; notes what."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = threading.Event()
        self.may_compile = threading.Event()
        self.compiled: list[str] = []

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        self.has_begun.set()
        assert self.may_compile.wait(DEADLINE_S)
        self.compiled.append(grammar.source)
        return super().compile(grammar)


class HeldStep(FakeStep):
    """Sampled in two phases: allowed tokens are known only when it is."""

    def __init__(self, device: MaskedDevice, token_ids: list[int], plan: StepPlan) -> None:
        super().__init__(device, token_ids)
        self._masked = device
        self._plan = plan
        self._is_sampled = not plan.constrained

    def ready(self) -> bool:
        return self._is_sampled and super().ready()

    def sample(self, masks: TokenMasks) -> None:
        assert not self._is_sampled
        self._is_sampled = True
        self._masked.num_waiting -= 1
        for row, words in zip(masks.rows.tolist(), masks.bitmask.tolist(), strict=True):
            allowed = [token for token in range(VOCAB) if words[token // 32] >> (token % 32) & 1]
            token = self._token_ids[row] = allowed[self._token_ids[row] % len(allowed)]
            self._masked._last_token[self._plan.sampled[row].slot] = token


class MaskedDevice(FakeDevice):
    def __init__(self, *, runs_ahead: bool = True) -> None:
        super().__init__(64, 4, 8, runs_ahead=runs_ahead)
        self.num_waiting = 0  # launched steps that are not sampled
        self.num_held_behind = 0  # of them, launched while the step before was on the device

    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> FakeStep:
        assert not self.num_waiting, "a step is sampled before another is launched"
        step = super().launch(plan, watch)
        if plan.constrained:
            self.num_waiting += 1
            self.num_held_behind += self.num_launched - self.num_collected > 1
        return HeldStep(self, step._token_ids, plan)


class World(EngineWorld):
    """Waits for the compiler where a test says so."""

    def __init__(
        self, *, runs_ahead: bool = True, overlap: bool = True, compiler: LocalCompiler | None = None
    ) -> None:
        self.compiler = compiler or LocalCompiler()
        self.delivered = threading.Semaphore(0)
        self.desk = GrammarDesk(lambda: self.compiler, self._deliver)
        super().__init__(
            device=MaskedDevice(runs_ahead=runs_ahead),
            overlap=overlap,
            grammars=GrammarParts(self.desk, MaskFiller(8, VOCAB, pinned=False)),
        )

    def compiled(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.delivered.acquire(timeout=DEADLINE_S), "the grammar was not compiled in time"

    def _deliver(self, ready: GrammarReady) -> None:
        self.engine.deliver(ready)
        self.delivered.release()
