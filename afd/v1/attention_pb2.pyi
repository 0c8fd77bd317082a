from afd.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "choice", "epoch", "token_ids", "num_generated", "sampling", "priority", "is_begun")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    IS_BEGUN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    epoch: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_generated: int
    sampling: _sampling_pb2.SamplingParams
    priority: int
    is_begun: bool
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., epoch: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_generated: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., is_begun: bool = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[DecodedToken]
    def __init__(self, tokens: _Optional[_Iterable[_Union[DecodedToken, _Mapping]]] = ...) -> None: ...

class DecodedToken(_message.Message):
    __slots__ = ("index", "id", "logprob", "top_logprobs", "finish_reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[_sampling_pb2.TokenLogprob]
    finish_reason: _sampling_pb2.FinishReason
    def __init__(self, index: _Optional[int] = ..., id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[_sampling_pb2.TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[_sampling_pb2.FinishReason, str]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_kv_blocks", "num_kv_blocks_used", "num_frames_in_flight", "num_steps", "num_preemptions", "step_seconds")
    class StepSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_kv_blocks_used: int
    num_frames_in_flight: int
    num_steps: int
    num_preemptions: int
    step_seconds: _containers.ScalarMap[str, float]
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_kv_blocks: _Optional[int] = ..., num_kv_blocks_used: _Optional[int] = ..., num_frames_in_flight: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., step_seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...

class GetStepRequest(_message.Message):
    __slots__ = ("slowest",)
    SLOWEST_FIELD_NUMBER: _ClassVar[int]
    slowest: bool
    def __init__(self, slowest: bool = ...) -> None: ...

class GetStepResponse(_message.Message):
    __slots__ = ("duration_ns", "num_sequences", "num_tokens", "transports", "intervals", "handoffs")
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    INTERVALS_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    duration_ns: int
    num_sequences: int
    num_tokens: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    intervals: _containers.RepeatedCompositeFieldContainer[StepInterval]
    handoffs: _containers.RepeatedCompositeFieldContainer[StepHandoff]
    def __init__(self, duration_ns: _Optional[int] = ..., num_sequences: _Optional[int] = ..., num_tokens: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., intervals: _Optional[_Iterable[_Union[StepInterval, _Mapping]]] = ..., handoffs: _Optional[_Iterable[_Union[StepHandoff, _Mapping]]] = ...) -> None: ...

class StepInterval(_message.Message):
    __slots__ = ("part", "layer_idx", "microbatch", "start_ns", "end_ns")
    PART_FIELD_NUMBER: _ClassVar[int]
    LAYER_IDX_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    END_NS_FIELD_NUMBER: _ClassVar[int]
    part: str
    layer_idx: int
    microbatch: int
    start_ns: int
    end_ns: int
    def __init__(self, part: _Optional[str] = ..., layer_idx: _Optional[int] = ..., microbatch: _Optional[int] = ..., start_ns: _Optional[int] = ..., end_ns: _Optional[int] = ...) -> None: ...

class StepHandoff(_message.Message):
    __slots__ = ("shard", "layer_idx", "microbatch", "sent_ns", "arrived_ns", "queue_ns", "compute_ns")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    LAYER_IDX_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    shard: int
    layer_idx: int
    microbatch: int
    sent_ns: int
    arrived_ns: int
    queue_ns: int
    compute_ns: int
    def __init__(self, shard: _Optional[int] = ..., layer_idx: _Optional[int] = ..., microbatch: _Optional[int] = ..., sent_ns: _Optional[int] = ..., arrived_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ...) -> None: ...
