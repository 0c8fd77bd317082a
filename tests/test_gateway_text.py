"""Text at the gateway: stop strings, the tokenizer's streams, and chat templates."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from afd.errors import CheckpointError, InvalidRequest
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.state.requests import JournaledToken
from services.gateway.stop_strings import StopStrings
from services.gateway.tokenizer import Tokenizer
from services.gateway.transcript import Transcript

examples = settings(max_examples=300, deadline=None, derandomize=True)
BYTE_IDS = range(2, 258)  # of the byte tokenizer: id 2 + b is the byte b

# --- stop strings ---

letters = st.text("abc", max_size=6)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def cut_by_brute_force(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, and of those complete with it, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def shown(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What is shown after each piece, and whether a stop string ended it."""
    cutter, parts = StopStrings(stops), []
    for piece in pieces:
        parts.append(cutter.push(piece))
        if cutter.hit:
            return parts, True
    return [*parts, cutter.rest()], False


@examples
@given(st.lists(letters, max_size=6), stop_lists)
@example(["abcab"], ["abca", "bc"])
def test_text_ends_before_the_first_stop_string_however_it_is_cut_into_pieces(
    pieces: list[str], stops: list[str]
) -> None:
    parts, hit = shown(pieces, stops)
    assert ("".join(parts), hit) == cut_by_brute_force("".join(pieces), stops)


@examples
@given(st.text("abc", max_size=20), stop_lists)
@example("abcab", ["abca", "bc"])
def test_one_piece_or_single_letters_make_no_difference(text: str, stops: list[str]) -> None:
    whole, letter_by_letter = shown([text], stops), shown(list(text), stops)
    assert "".join(whole[0]) == "".join(letter_by_letter[0])
    assert whole[1] == letter_by_letter[1]


@examples
@given(st.lists(letters, max_size=6), stop_lists)
def test_only_what_can_become_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    cutter, text, given_out = StopStrings(stops), "", ""
    for piece in pieces:
        text += piece
        given_out += cutter.push(piece)
        if cutter.hit:
            return
        held = text[len(given_out) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stop_strings_everything_is_shown_at_once() -> None:
    assert shown(["The sky", " is"], []) == (["The sky", " is", ""], False)


def test_a_stop_string_across_three_pieces_is_never_shown() -> None:
    assert shown(["Hi\n", "\nUs", "er: x"], ["\n\nUser:"]) == (["Hi", "", ""], True)


def test_a_false_start_is_shown_when_it_turns_out_to_be_one() -> None:
    assert shown(["a EN", "Dless"], ["END."]) == (["a ", "ENDless", ""], False)


def test_nothing_is_left_after_a_stop_string() -> None:
    cutter = StopStrings(["x"])
    assert cutter.push("abxcd") == "ab"
    assert (cutter.hit, cutter.rest()) == (True, "")


# --- streams of text ---


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_checkpoint(path, ModelSizes(num_hidden_layers=1, moe_layers_enum="", vocab_size=258))
    return path


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir, 10**6)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return asyncio.run(tokenizer.encode(text))


def encode_chat(tokenizer: Tokenizer, conversation: list[dict[str, object]], **options: bool) -> list[int]:
    return asyncio.run(tokenizer.encode_chat(conversation, **options))


def streamed(tokenizer: Tokenizer, token_ids: list[int]) -> tuple[list[str], str]:
    """The text of each token, and what is left at the end."""
    stream = tokenizer.stream()
    return [stream.push(token_id) for token_id in token_ids], stream.rest()


def test_any_text_streamed_token_by_token_is_the_text(tokenizer: Tokenizer) -> None:
    @examples
    @given(st.text(max_size=30).filter(lambda text: not re.search("<[a-z_|]+>", text)))  # what might be a special token
    @example("naïve 東京 🦆👩\u200d🚀 e\u0301 \ufffd \x00 ' s  \n")
    def check(text: str) -> None:
        parts, rest = streamed(tokenizer, encode(tokenizer, text))
        assert "".join(parts) + rest == text
        assert tokenizer.decode(encode(tokenizer, text)) == text

    check()


def test_any_tokens_even_broken_characters_stream_to_what_they_decode_to(tokenizer: Tokenizer) -> None:
    broken = st.sampled_from([2 + byte for byte in b"\xff\x80\xe2\x82\xac\xf0\x9f\xa6\x86ab"])

    @examples
    @given(st.lists(st.sampled_from(BYTE_IDS) | broken | st.integers(0, 1), max_size=25))
    def check(token_ids: list[int]) -> None:
        parts, rest = streamed(tokenizer, token_ids)
        assert "".join(parts) + rest == tokenizer.decode(token_ids)

    check()


def test_a_character_is_shown_when_it_is_complete(tokenizer: Tokenizer) -> None:
    parts, rest = streamed(tokenizer, encode(tokenizer, "a€b"))
    assert (parts, rest) == (["a", "", "", "€", "b"], "")


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    parts, rest = streamed(tokenizer, encode(tokenizer, "ab€")[:-1])
    assert ("".join(parts), rest) == ("ab", "\ufffd")


def test_special_tokens_are_not_shown_but_have_a_name(tokenizer: Tokenizer) -> None:
    parts, rest = streamed(tokenizer, [0, *encode(tokenizer, "hi"), 1])
    assert "".join(parts) + rest == "hi"
    assert (tokenizer.token_text(1), tokenizer.token_text(2 + ord("h"))) == ("<eos>", "h")


def test_a_book_is_encoded_like_a_sentence(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, "0123é" * 20_000) == encode(tokenizer, "0123é") * 20_000


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest):
        encode(tokenizer, "half of a pair: \ud83e")


def test_a_model_without_a_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    bare = Tokenizer(tmp_path, 10**6)
    with pytest.raises(InvalidRequest, match="send token ids") as caught:
        encode(bare, "hi")
    assert caught.value.param == "prompt"
    assert streamed(bare, [1, 2]) == (["", ""], "")
    assert (bare.decode([1]), bare.token_text(1)) == ("", "")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00"])
def test_a_tokenizer_file_that_is_none_stops_the_service(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path, 10**6)


# --- chat templates ---

MakeChat = Callable[..., Tokenizer]


@pytest.fixture
def make_chat(model_dir: Path, tmp_path: Path) -> MakeChat:
    def make(template: object, **config: object) -> Tokenizer:
        shutil.copy(model_dir / "tokenizer.json", tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
        return Tokenizer(tmp_path, 10**6)

    return make


def messages(*contents: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content} for content in contents]


def test_a_conversation_becomes_what_the_template_writes(make_chat: MakeChat) -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = make_chat(template, bos_token="<bos>", eos_token={"content": "<eos>"})
    assert encode_chat(chat, messages("hé")) == [0, *encode(chat, "[user]hé"), 1, *encode(chat, "[assistant]")]
    assert encode_chat(chat, messages("a"), add_generation_prompt=False) == [0, *encode(chat, "[user]a"), 1]


def test_a_template_in_a_file_of_its_own_goes_first(make_chat: MakeChat, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file: ü", encoding="utf-8")
    chat = make_chat("config")
    assert chat.decode(encode_chat(chat, messages("x"))) == "file: ü"


def test_a_model_without_a_template_refuses_chats(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        encode_chat(tokenizer, messages("hi"))
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ (messages | first).clear() }}",
        "{{ messages.append(1) }}",
        "{{ messages['__class__']['__mro__'] }}",
        "{{ ('%s' | attr('format')).__globals__ }}{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_gets_at_nothing_but_the_messages(make_chat: MakeChat, template: str) -> None:
    with pytest.raises(InvalidRequest, match="the chat template refuses"):
        encode_chat(make_chat(template), messages("hi"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ nothing.at.all }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content.upper(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content']['key'].more }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_the_requests_fault(make_chat: MakeChat, template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode_chat(make_chat(template), messages("hi"))
    assert caught.value.param == "messages"


def test_the_templates_own_words_reach_the_caller(make_chat: MakeChat) -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        encode_chat(make_chat("{{ raise_exception('roles must alternate') }}"), messages("hi"))


@pytest.mark.parametrize("template", ["{% if %}", "{{", 7, ["x"]])
def test_a_template_that_is_none_stops_the_service(make_chat: MakeChat, template: object) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        make_chat(template)


def test_templates_may_leave_a_loop_as_hugging_faces_do(make_chat: MakeChat) -> None:
    chat = make_chat("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}")
    assert chat.decode(encode_chat(chat, messages("a", "b"))) == "a"


def test_templates_write_json_as_hugging_faces_do(make_chat: MakeChat) -> None:
    chat = make_chat("{{ messages[0] | tojson }}")
    assert chat.decode(encode_chat(chat, messages("<é>"))) == '{"role": "user", "content": "<é>"}'


def test_text_that_cannot_fit_is_refused_before_it_is_encoded(model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="more than fit into a context of 8 tokens"):
        asyncio.run(Tokenizer(model_dir, 8).encode("x" * 1000))


# --- what is shown of tokens that come together ---


def test_of_tokens_that_come_together_none_is_shown_behind_the_stop_string(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer, ("lo w",), 0)
    tokens = [JournaledToken(token_id, -1.0) for token_id in encode(tokenizer, "hello world")]
    shown = transcript.extend(tokens)
    assert ("".join(token.text for token in shown), shown[-1].finish_reason) == ("hel", "stop")
    assert len(shown) == len(transcript.tokens) == len("hello w")
    assert transcript.is_ended
    assert transcript.extend(tokens) == []
