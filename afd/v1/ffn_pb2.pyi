from afd.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("hello", "frame", "drop_frame")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    DROP_FRAME_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    frame: Frame
    drop_frame: DropFrame
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., drop_frame: _Optional[_Union[DropFrame, _Mapping]] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("welcome", "output", "frame_error")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    FRAME_ERROR_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    output: FrameOutput
    frame_error: FrameError
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., output: _Optional[_Union[FrameOutput, _Mapping]] = ..., frame_error: _Optional[_Union[FrameError, _Mapping]] = ...) -> None: ...

class Topology(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint", "hidden_size", "num_layers", "num_experts", "top_k", "dtype", "shard", "num_shards")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_fingerprint: str
    hidden_size: int
    num_layers: int
    num_experts: int
    top_k: int
    dtype: _tensor_pb2.Dtype
    shard: int
    num_shards: int
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., hidden_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., shard: _Optional[int] = ..., num_shards: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("replica_id", "topology", "frame_dtype", "output_dtype", "num_slots", "max_tokens", "shm", "nixl")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    FRAME_DTYPE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHM_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    topology: Topology
    frame_dtype: _tensor_pb2.Dtype
    output_dtype: _tensor_pb2.Dtype
    num_slots: int
    max_tokens: int
    shm: ShmOffer
    nixl: NixlOffer
    def __init__(self, replica_id: _Optional[str] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., frame_dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., output_dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., num_slots: _Optional[int] = ..., max_tokens: _Optional[int] = ..., shm: _Optional[_Union[ShmOffer, _Mapping]] = ..., nixl: _Optional[_Union[NixlOffer, _Mapping]] = ...) -> None: ...

class ShmOffer(_message.Message):
    __slots__ = ("socket_name",)
    SOCKET_NAME_FIELD_NUMBER: _ClassVar[int]
    socket_name: str
    def __init__(self, socket_name: _Optional[str] = ...) -> None: ...

class NixlOffer(_message.Message):
    __slots__ = ("version", "metadata", "address", "num_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: str
    metadata: bytes
    address: int
    num_bytes: int
    def __init__(self, version: _Optional[str] = ..., metadata: _Optional[bytes] = ..., address: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("replica_id", "topology", "max_frame_tokens", "declined", "nixl")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    topology: Topology
    max_frame_tokens: int
    declined: str
    nixl: NixlOffer
    def __init__(self, replica_id: _Optional[str] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., max_frame_tokens: _Optional[int] = ..., declined: _Optional[str] = ..., nixl: _Optional[_Union[NixlOffer, _Mapping]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("frame_id", "layer_idx", "ffn_input", "topk_ids", "topk_weights", "traceparent", "scales", "probe", "epoch", "priority", "time_left_us")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_IDX_FIELD_NUMBER: _ClassVar[int]
    FFN_INPUT_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_US_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    layer_idx: int
    ffn_input: _tensor_pb2.Tensor
    topk_ids: _tensor_pb2.Tensor
    topk_weights: _tensor_pb2.Tensor
    traceparent: str
    scales: _tensor_pb2.Tensor
    probe: bool
    epoch: int
    priority: int
    time_left_us: int
    def __init__(self, frame_id: _Optional[int] = ..., layer_idx: _Optional[int] = ..., ffn_input: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., topk_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., topk_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., traceparent: _Optional[str] = ..., scales: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., probe: bool = ..., epoch: _Optional[int] = ..., priority: _Optional[int] = ..., time_left_us: _Optional[int] = ...) -> None: ...

class DropFrame(_message.Message):
    __slots__ = ("frame_id",)
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    def __init__(self, frame_id: _Optional[int] = ...) -> None: ...

class FrameOutput(_message.Message):
    __slots__ = ("frame_id", "ffn_output", "queue_ns", "compute_ns", "num_batch_tokens")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    FFN_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    ffn_output: _tensor_pb2.Tensor
    queue_ns: int
    compute_ns: int
    num_batch_tokens: int
    def __init__(self, frame_id: _Optional[int] = ..., ffn_output: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., queue_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ..., num_batch_tokens: _Optional[int] = ...) -> None: ...

class FrameError(_message.Message):
    __slots__ = ("frame_id", "message", "stale")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    message: str
    stale: bool
    def __init__(self, frame_id: _Optional[int] = ..., message: _Optional[str] = ..., stale: bool = ...) -> None: ...

class GetTopologyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTopologyResponse(_message.Message):
    __slots__ = ("replica_id", "topology", "max_frame_tokens")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_TOKENS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    topology: Topology
    max_frame_tokens: int
    def __init__(self, replica_id: _Optional[str] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., max_frame_tokens: _Optional[int] = ...) -> None: ...

class GetFfnLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetFfnLoadResponse(_message.Message):
    __slots__ = ("num_streams", "num_frames_queued", "num_frames", "num_batches", "num_frames_dropped", "num_frames_refused", "compute_seconds")
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_QUEUED_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_DROPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_REFUSED_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    num_streams: int
    num_frames_queued: int
    num_frames: int
    num_batches: int
    num_frames_dropped: int
    num_frames_refused: int
    compute_seconds: float
    def __init__(self, num_streams: _Optional[int] = ..., num_frames_queued: _Optional[int] = ..., num_frames: _Optional[int] = ..., num_batches: _Optional[int] = ..., num_frames_dropped: _Optional[int] = ..., num_frames_refused: _Optional[int] = ..., compute_seconds: _Optional[float] = ...) -> None: ...
