"""mkdocs hook: the page of the protocol, from the messages of protos/ and the comments beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

PROTOS = Path(__file__).parents[2] / "protos"
SHOWN = ("afd/v1/gateway.proto", "afd/v1/sampling.proto")
MARK = "<!-- protocol -->"
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6  # fields of FileDescriptorProto; a path to a comment begins with one
_FIELDS = _VALUES = _METHODS = 2  # of the messages in these

Comments = dict[tuple[int, ...], str]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown.replace(MARK, "\n".join(_lines())) if MARK in markdown else markdown


def _lines() -> Iterator[str]:
    for file in _files():
        comments = _comments(file)
        for i, service in enumerate(file.service):
            yield from _service(service, (_SERVICES, i), comments)
        for i, message in enumerate(file.message_type):
            yield from _message(message, (_MESSAGES, i), comments)
        for i, enum in enumerate(file.enum_type):
            yield from _enum(enum, (_ENUMS, i), comments)


def _files() -> list[FileDescriptorProto]:
    with tempfile.NamedTemporaryFile() as out:
        options = [f"--proto_path={PROTOS}", "--include_source_info", f"--descriptor_set_out={out.name}"]
        if protoc.main(["protoc", *options, *SHOWN]):
            raise RuntimeError("protoc does not take the protos")
        files = FileDescriptorSet.FromString(Path(out.name).read_bytes()).file
    return sorted(files, key=lambda file: SHOWN.index(file.name))


def _comments(file: FileDescriptorProto) -> Comments:
    """By the path of what they stand above."""
    return {tuple(each.path): " ".join(each.leading_comments.split()) for each in file.source_code_info.location}


def _service(service: ServiceDescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield from (f"## {service.name}", "", comments[path], "")
    for i, method in enumerate(service.method):
        answer = ("stream of " if method.server_streaming else "") + _link(method.output_type)
        yield from (f"### {method.name}", "", f"{_link(method.input_type)} → {answer}", "")
        yield from (comments[(*path, _METHODS, i)], "")


def _message(message: DescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield from (f"## {message.name}", "", comments[path], "")
    nested = {f"{message.name}.{each.name}": each for each in message.nested_type}
    if message.field:
        yield from ("| field | | |", "|---|---|---|")
    for i, field in enumerate(message.field):
        yield f"| `{field.name}` | {_type(field, nested)} | {comments[(*path, _FIELDS, i)]} |"
    yield ""


def _enum(enum: EnumDescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield from (f"## {enum.name}", "", comments[path], "", "| | |", "|---|---|")
    for i, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {comments[(*path, _VALUES, i)]} |"
    yield ""


def _type(field: FieldDescriptorProto, nested: dict[str, DescriptorProto]) -> str:
    """As the .proto file writes it."""
    entry = nested.get(field.type_name.removeprefix(".afd.v1."))
    if entry is not None:
        key, value = entry.field
        return f"map of {_type(key, nested)} to {_type(value, nested)}"
    name = _link(field.type_name) if field.type_name else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    return f"{name}, or another prompt" if field.HasField("oneof_index") else name


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"
