"""Faults and private parts of torch and wandb that we guard against or rely on.

Torch-free.
"""

from __future__ import annotations

from parallel.compat.guard import Guard

TORCH_GUARDS = (
    Guard(
        fault="The lock of torch's C++ compilation is a file that a killed process leaves behind",
        library="torch",
        guard="parallel.compat.deepspeed.operators:build_operator",
        symptom="after a kill during a compilation every later run waits for ever",
        test="tests/parallel/compat/test_deepspeed_start.py::test_a_lock_left_by_a_killed_process_is_removed",
        names=("torch.utils.cpp_extension:_get_build_directory",),
    ),
    Guard(
        fault="torch has no public list of the buffers that a state_dict holds, without a copy of them",
        library="torch",
        guard="parallel.compat.torch_private:saved_buffers",
        symptom="checkpoints lack the experts' bias, or hold buffers that a restored run does not know",
        test="tests/parallel/compat/test_torch_private.py::test_saved_buffers_are_those_of_a_state_dict",
        names=("torch.nn:Module#_buffers", "torch.nn:Module#_non_persistent_buffers_set"),
    ),
    Guard(
        fault="The recording of CUDA allocations has private names only",
        library="torch",
        guard="parallel.compat.torch_private:record_cuda_memory",
        symptom="metrics.profile.memory_snapshot ends the run with an AttributeError",
        test="tests/parallel/compat/test_index.py::test_private_names_exist",
        names=("torch.cuda.memory:_record_memory_history", "torch.cuda.memory:_dump_snapshot"),
    ),
    Guard(
        fault="The first optimizer of a process imports torch._dynamo",
        library="torch",
        guard="parallel.compat.torch_private:import_dynamo",
        symptom="every forked rank of a rehearsal starts 0.9 s later",
        test="tests/parallel/compat/test_torch_private.py::test_dynamo_is_there_before_ranks_are_forked",
    ),
    Guard(
        fault="torchrun's function for --run-path loses a rank's traceback, output and atexit functions, and cannot be chosen",
        library="torch",
        guard="parallel.compat.torch_agent:program_function",
        symptom="the log of a rank that failed holds no traceback",
        test="tests/launch/test_fork_server.py::test_a_failing_import_is_in_the_ranks_log",
        names=("torch.distributed.run:run_script_path",),
    ),
    Guard(
        fault="Of ranks that are functions, torch's agent reports one failure, late, and keeps each until all have returned",
        library="torch",
        guard="parallel.compat.torch_agent:ends_from_exit_codes",
        symptom="a partner of the killed rank is reported in its place; a failed run ends 30 s late",
        test="tests/launch/test_fork_server.py::test_all_failed_ranks_are_reported",
        names=(
            "torch.distributed.elastic.multiprocessing.api:MultiprocessContext._poll",
            "torch.distributed.elastic.multiprocessing.api:MultiprocessContext#_pc",
        ),
    ),
    Guard(
        fault="W&B tells nobody which rows of an offline run have reached its file",
        library="wandb",
        guard="parallel.compat.wandb_files:SegmentReader",
        symptom="after a kill W&B has steps twice, or lacks some",
        test="tests/pretrain/metrics/test_wandb.py::test_offline_kills_and_replays_give_each_step_once",
    ),
)
