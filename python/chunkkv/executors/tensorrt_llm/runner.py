"""TensorRT-LLM's own Python runtime, with the blocks of compacted prompts given back to its pool.

ChunkKVGenerationSession and ChunkKVModelRunner are subclasses of GenerationSession and ModelRunner, made when first
asked for, because importing tensorrt_llm takes long and needs a GPU machine. Tokens are right without them; they return
blocks and tell attention the compacted length. All prompts of a batch are still prefilled together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkkv.engine.tensorrt_llm_side_file import SideFile
from chunkkv.errors import EngineRunError
from chunkkv.executors.tensorrt_llm.engine import import_tensorrt_llm
from chunkkv.gpu.tensorrt_errors import ErrorLog, start
from chunkkv.gpu.tensorrt_library import TensorRT
from chunkkv.gpu.tensorrt_plugins import TENSORRT_LLM_PLUGINS, load_plugins
from chunkkv.settings import ChunkKVSettings

if TYPE_CHECKING:
    ChunkKVGenerationSession: Any
    ChunkKVModelRunner: Any

__all__ = ["ChunkKVGenerationSession", "ChunkKVModelRunner", "truncate_pools"]


def __getattr__(name: str) -> Any:
    """Return one of the two classes; raises BackendUnavailableError where TensorRT-LLM is missing."""
    if name not in ("ChunkKVGenerationSession", "ChunkKVModelRunner"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_tensorrt_llm(__name__)
    from tensorrt_llm.builder import Engine
    from tensorrt_llm.runtime import model_runner
    from tensorrt_llm.runtime.generation import GenerationSession

    session_class = _session_class(GenerationSession)
    return session_class if name == "ChunkKVGenerationSession" else _runner_class(session_class, Engine, model_runner)


def truncate_pools(pools: Any, kept: Sequence[int]) -> int:
    """Give back the blocks behind kept[b] tokens of every sequence of a PoolsKVCacheManager; return how many.

    The sequences go on at slot kept[b]: their lengths in the managers become kept[b].
    """
    freed = 0
    for manager in pools._kv_cache_managers:
        for sequence in manager.sequences:
            slots = kept[sequence.get_batch_idx()] + manager.bubble_len
            blocks = -(-slots // manager.tokens_per_block)
            for beam in manager.blocks_manager.allocated_blocks[sequence]:
                for block in beam[blocks:]:
                    block.remove_link()
                    if not block.has_link():
                        manager.blocks_manager.free_blocks.append(block)
                        freed += 1
                del beam[blocks:]
            manager.lens[sequence.get_batch_idx()] = slots
    return freed


@cache  # every access must give the same class
def _session_class(generation_session: Any) -> type:
    """Return the subclass of tensorrt_llm's GenerationSession."""

    class ChunkKVGenerationSession(generation_session):
        """A GenerationSession that returns the blocks of dropped tokens after prefill; set `chunkkv` before decode().

        `blocks_returned` counts those of the last batch.
        """

        chunkkv: ChunkKVSettings | None = None
        blocks_returned = 0
        _kept: tuple[int, ...] = ()

        def _prepare_context_inputs(
            self, batch_size: int, context_lengths: Any, host_context_lengths: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if self.chunkkv is None:
                raise EngineRunError("set the session's attribute chunkkv to the engine's settings before decode()")
            self._kept = tuple(self.chunkkv.kept_tokens(int(length)) for length in host_context_lengths)
            return super()._prepare_context_inputs(batch_size, context_lengths, host_context_lengths, *args, **kwargs)

        def _prepare_generation_inputs(self, batch_size: int, context_lengths: Any, *args: Any, **kwargs: Any) -> Any:
            # Step 0: prefill is enqueued, the manager has not yet moved to the next slot. One stream runs all, so a
            # block that changes hands here is not written before it was read.
            if kwargs["step"] == 0 and self.paged_kv_cache:
                self.blocks_returned = truncate_pools(self.pools_kv_cache_manager, self._kept)
            return super()._prepare_generation_inputs(batch_size, context_lengths, *args, **kwargs)

        def _get_next_step_shape_buffer(
            self, batch_size: int, beam_width: int, max_context_length: int, step: int, *args: Any, **kwargs: Any
        ) -> Any:
            # Becomes host_past_key_value_lengths, from which attention plans its grid: the logical length would
            # leave most of its blocks without work.
            longest = max(self._kept)
            return super()._get_next_step_shape_buffer(batch_size, beam_width, longest, step, *args, **kwargs)

    return ChunkKVGenerationSession


@cache
def _runner_class(session_class: type, engine_class: Any, model_runner: Any) -> type:
    """Return the subclass of model_runner.ModelRunner that runs sessions of `session_class`."""

    class ChunkKVModelRunner(model_runner.ModelRunner):
        """A ModelRunner over a ChunkKVGenerationSession; one process per rank, as ModelRunner itself."""

        @classmethod
        def from_dir(
            cls,
            engine_dir: str | Path,
            *,
            rank: int = 0,
            debug_mode: bool = False,
            stream: Any = None,
            gpu_weights_percent: float = 1,
            enable_context_fmha_fp32_acc: bool | None = None,
            multi_block_mode: bool = True,
            cuda_graph_mode: bool = False,
        ) -> Any:
            """Load the engine of `rank`; raises EngineError for a directory without ChunkKV's side file."""
            settings = SideFile.read(Path(engine_dir)).settings
            _register_plugins(Path(engine_dir))
            engine = engine_class.from_dir(str(engine_dir), rank)
            model = model_runner._engine_config_to_model_config(engine.config, gpu_weights_percent=gpu_weights_percent)
            limits, mapping = engine.config.build_config, engine.config.pretrained_config.mapping
            model_runner.torch.cuda.set_device(rank % mapping.gpus_per_node)
            session = session_class(
                model, engine.engine, mapping, debug_mode=debug_mode, stream=stream, cuda_graph_mode=cuda_graph_mode
            )
            session.chunkkv = settings
            if session.runtime.engine.streamable_weights_size:  # --weight_streaming: no context exists before
                session.runtime._set_weight_streaming(gpu_weights_percent)
            runner = cls(
                session=session,
                max_batch_size=limits.max_batch_size,
                max_input_len=limits.max_input_len,
                max_seq_len=limits.max_seq_len,
                max_beam_width=limits.max_beam_width,
                kv_cache_type=model.kv_cache_type,
            )
            runner.enable_context_fmha_fp32_acc = enable_context_fmha_fp32_acc
            runner.multi_block_mode = multi_block_mode
            return runner

    return ChunkKVModelRunner


def _register_plugins(path: Path) -> None:
    """Register ChunkKV's plugins in this process, before an engine that needs them is read."""
    trt, messages = import_tensorrt_llm(path), ErrorLog()
    logger = messages.logger(trt)
    library = TensorRT.of(trt)
    runtime = start(library, trt.Runtime, logger, messages)
    load_plugins(library, trt.get_plugin_registry(), messages, TENSORRT_LLM_PLUGINS)
    del runtime
