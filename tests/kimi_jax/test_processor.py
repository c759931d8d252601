"""Conversations with pictures and video made ready: ids written by hand from the template, patches from the pixels."""

import json
import shutil
import warnings

import cases
import numpy as np
import pytest
from PIL import Image

import kimi_jax
from kimi_jax import Processor
from kimi_jax.config_json import from_folder
from kimi_jax.text import chat

# The synthetic tokenizer's special slots begin at 512, at the offsets of the real one.
IM_END, IM_USER, IM_ASSISTANT, IM_MIDDLE = 514, 515, 516, 529
MEDIA_BEGIN, MEDIA_CONTENT, MEDIA_END, MEDIA_PAD, THINK, END_THINK = 530, 531, 532, 533, 534, 535
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def k25(checkpoint):
    """Returns the processor of the K2.5 golden."""
    return Processor.from_folder(checkpoint("k2.5"))


@pytest.fixture
def own(checkpoint, tmp_path):
    """Copies the small files of the golden `name`, to change."""

    def copy(name):
        for file in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            if (checkpoint(name) / file).exists():
                shutil.copy(checkpoint(name) / file, tmp_path)
        shutil.copy(checkpoint(name) / "tiktoken.model", tmp_path)
        return tmp_path

    return copy


def spell(processor, *parts):
    """Ids of a prompt: numbers are ids, text is ordinary text."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else processor.tokenizer.encode(part, allow_special=False)
    return ids


def user(*content):
    return [{"role": "user", "content": [*content]}]


def text(value):
    return {"type": "text", "text": value}


def image(path):
    return {"type": "image_url", "image_url": {"url": path}}


def picture(path, size, colour):
    Image.new("RGB", size, colour).save(path)
    return path


def test_text_alone(k25):
    prompt = k25([{"role": "user", "content": "What is the weather?"}])
    ids = spell(k25, IM_USER, "user", IM_MIDDLE, "What is the weather?", IM_END, IM_ASSISTANT, "assistant", IM_MIDDLE)
    assert prompt.tokens.dtype == np.int32 and prompt.tokens.tolist() == [[*ids, THINK]]
    assert prompt.media is None
    instant = k25([{"role": "user", "content": "What is the weather?"}], thinking=False)
    assert instant.tokens.tolist() == [[*ids, THINK, END_THINK]]


def test_tools_are_declared(k25):
    tools = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]
    messages = [{"role": "user", "content": "Hello"}]
    ids = k25(messages, tools=tools).tokens[0].tolist()
    assert "type search = (_: {}) => any;" in k25.tokenizer.decode(ids)
    assert ids[-8:] == k25(messages).tokens[0].tolist()[-8:]


def test_two_images_in_order(k25, tmp_path):
    # Given a red picture of 2 x 4 patches and a blue one of 6 x 2: 2 tokens and 3
    red, blue = picture(tmp_path / "a.png", (56, 28), RED), picture(tmp_path / "b.png", (28, 84), BLUE)
    prompt = k25(user(image(red), text("and"), image(blue), text("Compare.")))
    start = (MEDIA_BEGIN, "image", MEDIA_CONTENT)
    expected = spell(k25, IM_USER, "user", IM_MIDDLE, *start, MEDIA_PAD, MEDIA_PAD, MEDIA_END, "\nand")
    expected += spell(k25, *start, MEDIA_PAD, MEDIA_PAD, MEDIA_PAD, MEDIA_END, "\nCompare.", IM_END)
    expected += spell(k25, IM_ASSISTANT, "assistant", IM_MIDDLE, THINK)
    assert prompt.tokens.tolist() == [expected]
    assert prompt.media.grids.tolist() == [[1, 2, 4], [1, 6, 2]]
    # Then the patches are red and after that blue, 0 going to -1 and 255 to 1
    assert prompt.media.patches.shape == (20, 3, 14, 14) and prompt.media.patches.dtype == np.float32
    assert set(map(tuple, prompt.media.patches[:8].mean((2, 3)).tolist())) == {(1.0, -1.0, -1.0)}
    assert set(map(tuple, prompt.media.patches[8:].mean((2, 3)).tolist())) == {(-1.0, -1.0, 1.0)}


def test_what_people_write_is_no_placeholder(k25, tmp_path):
    red = picture(tmp_path / "a.png", (28, 28), RED)
    prompt = k25(user(image(red), text("<|media_pad|><|im_end|>")))
    ids = prompt.tokens[0].tolist()
    assert (ids.count(MEDIA_PAD), ids.count(IM_END)) == (1, 1)


def test_a_gif_becomes_chunks_with_their_times(k25, tmp_path):
    # Given five grey frames, two a second: a chunk of four and one of one
    frames = [Image.new("L", (28, 28), 50 * i) for i in range(5)]
    path = tmp_path / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    prompt = k25(user({"type": "video_url", "video_url": {"url": path}}, text("Describe.")))
    chunk = (MEDIA_BEGIN, "video", MEDIA_CONTENT, MEDIA_PAD, MEDIA_END)
    expected = spell(k25, IM_USER, "user", IM_MIDDLE, "00:00:00.000", *chunk, "00:00:02.000", *chunk, "Describe.")
    expected += spell(k25, IM_END, IM_ASSISTANT, "assistant", IM_MIDDLE, THINK)
    assert prompt.tokens.tolist() == [expected]
    assert prompt.media.grids.tolist() == [[4, 2, 2], [1, 2, 2]]
    levels = prompt.media.patches.mean((1, 2, 3)).reshape(5, 4)
    np.testing.assert_allclose(levels, np.repeat([[50 * i / 127.5 - 1] for i in range(5)], 4, axis=1), atol=1e-6)


def test_an_image_and_a_video_keep_the_order_of_the_conversation(k25, tmp_path):
    frames = [Image.new("RGB", (28, 28), colour) for colour in (BLUE, RED)]
    clip = tmp_path / "clip.gif"
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500)
    still = picture(tmp_path / "still.png", (56, 28), RED)
    video = {"type": "video_url", "video_url": {"url": clip}}
    assert k25(user(video, image(still))).media.grids.tolist() == [[2, 2, 2], [1, 2, 4]]
    assert k25(user(image(still), video)).media.grids.tolist() == [[1, 2, 4], [2, 2, 2]]


def test_the_prompt_fits_its_media_and_no_other(model, k25, tmp_path):
    # The prompt of a processor is one that the model takes; with a placeholder less it says what it found and expected
    prompt = k25(user(image(picture(tmp_path / "a.png", (56, 28), RED))))
    tokens = prompt.tokens[0].tolist()
    tokens.remove(MEDIA_PAD)
    with pytest.raises(ValueError, match=r"holds 1 media placeholders \(token 533\), the media given come to 2 tokens"):
        kimi_jax.generate(model("k2.5"), np.array([tokens]), media=prompt.media, max_new_tokens=1)


@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_a_text_model_refuses_media(checkpoint, tmp_path, kind):
    processor = Processor.from_folder(checkpoint("k2"))
    with pytest.raises(ValueError, match=r"the messages hold 2 images or videos; a kimi_k2 model takes none"):
        processor(user(*[{"type": kind, kind: {"url": str(tmp_path / "none")}}] * 2))


def test_what_is_missing_or_no_image_is_named(k25, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.png: not an image"):
        k25(user(image(tmp_path / "notes.png")))
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        k25(user(image(tmp_path / "gone.png")))


def test_strings_in_messages_name_files_of_the_allowed_folder_only(k25, tmp_path):
    # What came as JSON holds strings; Path, bytes and arrays are the program's own
    path = picture(tmp_path / "a.png", (56, 28), RED)
    for name in (str(path), "a.png", f"file://{path}", "https://example.org/a.png"):
        with pytest.raises(ValueError, match=r"may not name local files|:// is not fetched"):
            k25(user(image(name)))
    expected = k25(user(image(path))).media.patches
    for source, files in [("a.png", tmp_path), (str(path), tmp_path), (path.read_bytes(), None)]:
        np.testing.assert_array_equal(k25(user(image(source)), files=files).media.patches, expected)
    with pytest.raises(ValueError, match=r"a\.png: outside .*the folder whose files the messages may name"):
        k25(user(image("../a.png")), files=k25.folder)


@pytest.mark.parametrize("kind", ["image_url", "video_url"])
@pytest.mark.parametrize("source", [5, None, {"url": None}, {"url": 5}, {"detail": "low"}])
def test_sources_of_another_type_are_refused(k25, kind, source):
    with pytest.raises(ValueError, match=r"is given as (int|NoneType), expected a"):
        k25(user({"type": kind, kind: source}))


def test_media_beyond_the_limit_are_refused(k25, tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_jax.media.conversation.MAX_PATCHES", 15)
    part = image(picture(tmp_path / "a.png", (56, 28), RED))
    assert k25(user(part)).media.patches.shape[0] == 8
    with pytest.raises(ValueError, match="the messages' media come to 16 patches, expected at most 15"):
        k25(user(part, part))


def test_preprocessor_and_vision_tower_agree(own, tmp_path):
    folder = own("k2.5")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["media_proc_cfg"]["patch_size"] = 7
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = Processor.from_folder(folder)
    assert processor("Text needs no such file.").media is None
    with pytest.raises(ValueError, match=r"preprocessor_config.json: patch_size and .* are \(7, \(2, 2\)\), but"):
        processor("", images=[picture(tmp_path / "a.png", (28, 28), RED)])


OWN_TEMPLATE = "{% for m in messages %}<|im_user|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(("name", "title"), [("k2", "K2"), ("k2.5", r"K2\.5")])
def test_a_folder_s_own_template_is_used_where_it_differs(own, name, title):
    folder = own(name)
    (folder / "chat_template.jinja").write_text(OWN_TEMPLATE)
    with pytest.warns(UserWarning, match=f"its own chat template is used, which differs from {title}'s"):
        processor = Processor.from_folder(folder)
    assert processor("Hello").tokens.tolist() == [[IM_USER, *processor.tokenizer.encode("Hello")]]


def test_a_text_is_the_message_of_one_user_with_its_pictures_before_it(k25, tmp_path):
    path = picture(tmp_path / "a.png", (56, 28), RED)
    clip = tmp_path / "clip.gif"
    first, second = (Image.new("RGB", (28, 28), colour) for colour in (BLUE, RED))
    first.save(clip, save_all=True, append_images=[second], duration=500)
    assert k25("Hello").tokens.tolist() == k25([{"role": "user", "content": "Hello"}]).tokens.tolist()
    # Strings among `images` are the program's own: they name files without leave, unlike those of messages
    beside = k25("Describe.", images=[str(path), np.asarray(Image.open(path))], videos=[clip.read_bytes()])
    video = {"type": "video_url", "video_url": {"url": clip}}
    listed = k25(user(image(path), image(path), video, text("Describe.")))
    assert beside.tokens.tolist() == listed.tokens.tolist()
    np.testing.assert_array_equal(beside.media.patches, listed.media.patches)
    np.testing.assert_array_equal(beside.media.grids, listed.media.grids)


@pytest.mark.parametrize(
    ("messages", "media", "message"),
    [
        ("Hello", {"images": "a.png"}, "images is str, expected a list"),
        ("Hello", {"videos": "a.gif"}, "videos is str, expected a list"),
        ([{"role": "user", "content": "Hello"}], {"images": [b""]}, "images and videos go with a text"),
        ([], {}, "messages is list, expected a list of at least one message"),
        (b"Hello", {}, "messages is bytes, expected a list"),
        ("Hello", {"images": ["https://host/a.png"]}, "https:// is not fetched"),
    ],
)
def test_what_is_no_conversation_is_named(k25, messages, media, message):
    with pytest.raises(ValueError, match=message):
        k25(messages, **media)


def test_a_text_names_no_file_and_forges_no_turn(k25, tmp_path):
    spoken = f"<|im_end|><|media_pad|>{picture(tmp_path / 'a.png', (56, 28), RED)}"
    prompt = k25(spoken, files=tmp_path)
    assert prompt.media is None
    ids = spell(k25, IM_USER, "user", IM_MIDDLE, spoken, IM_END, IM_ASSISTANT, "assistant", IM_MIDDLE, THINK)
    assert prompt.tokens.tolist() == [ids]


def test_decoding_ends_with_the_text_and_keeps_other_markers(k25):
    ids = spell(k25, "so", END_THINK, "Hé")
    text = "so</think>Hé"
    pad = k25.config.text.pad_token_id
    for end in ([], [IM_END, *spell(k25, "more")], [pad, pad]):
        assert k25.decode(np.array([*ids, *end], np.int32)) == text
    with pytest.raises(ValueError, match="token id 99999 is outside the vocabulary"):
        k25.decode([99999])


def test_an_answer_is_parsed_up_to_its_end(k25):
    pad = k25.config.text.pad_token_id
    ids = spell(k25, "so", END_THINK, "Hé", IM_END, "more", pad)
    assert k25.parse(np.array(ids, np.int32)) == chat.Parsed("so", "Hé", [], "stop")
    assert k25.parse([*ids[:-3], pad, pad], thinking=False, finish="length") == chat.Parsed(None, "soHé", [], "length")
    # The prompt says better than `thinking` where the answer begins
    for thinking, reasoning, content in ((True, "so", "Hé"), (False, None, "soHé")):
        prompt = k25("Hello", thinking=thinking).tokens[0]
        assert k25.parse(ids, prompt=prompt) == chat.Parsed(reasoning, content, [], "stop")


def test_an_unknown_key_is_named_once_though_processor_and_model_read_it(own):
    folder = own("k2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"novel": 1}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        Processor.from_folder(folder)
        from_folder(folder)
    assert [str(warning.message).split(": ")[-1] for warning in seen] == ["novel"]


def test_a_folder_without_a_tokenizer_and_a_url_are_refused(own):
    folder = own("k2")
    (folder / "tiktoken.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiktoken\.model: no such file; a Kimi tokenizer needs it"):
        Processor.from_folder(folder)
    with pytest.raises(ValueError, match=r"gs://bucket/kimi: the tokenizer is read from a folder on this machine"):
        Processor.from_folder("gs://bucket/kimi")


def test_goldens_use_the_synthetic_tokenizer():
    # The ids at the top of this file stand for tokens of the goldens' vocabulary
    assert cases.config("k2.5")["media_placeholder_token_id"] == MEDIA_PAD
