"""The page of `chunkkv inspect`: what it says is what the engine chose, in a browser, on a phone, with hostile text."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support import engines
from support.class_engines import CLASSES, KV_HEADS, LAYERS, RANKED_HEADS, READING, settings_of
from support.class_engines import session as class_session
from support.messages import naming

from chunkkv.cli.main import main
from chunkkv.errors import EngineMismatchError, RequestError
from chunkkv.evaluation.report.inspect_page import render_page, write_page
from chunkkv.results import Inspection
from chunkkv.session import ChunkKVSession

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
NO_BROWSER = "needs Chromium and its driver: apt-get install chromium chromium-driver"
PHONE, DESK = (390, 844), (1280, 900)
PROMPT = "the key, of the cache is. in the token; a block of\nkeys and the cache: is the end! " * 4
HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)>&amp;"\'\u2028 __DATA__ <!-- '


@pytest.fixture(scope="module", params=["fixed", "delimiter"])
def session(request: pytest.FixtureRequest) -> ChunkKVSession:
    return engines.session("llama3", chunkkv_layer_reuse=2, chunkkv_boundaries=request.param, max_seq_len=512)


def page_data(page: str) -> dict:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_carries_the_engines_choice(session: ChunkKVSession) -> None:
    found = session.inspect(PROMPT, keep_ratio=0.3)
    result = session.generate(PROMPT, keep_ratio=0.3)
    assert found.kept_tokens == result.statistics.kept_tokens
    assert len(found.tokens) == len(found.token_ids) == result.statistics.prompt_tokens
    data = page_data(render_page(found))
    assert data["ids"] == list(found.token_ids) and data["kept_tokens"] == found.kept_tokens
    assert [g["layers"] for g in data["groups"]] == [[0, 1], [2]]
    for group, entry in zip(found.groups, data["groups"], strict=True):
        assert entry["kept"] == group.kept_indices.tolist() and len(entry["kept"]) == found.kept_tokens
        assert entry["chunk_starts"] == group.chunk_starts.tolist()


def test_the_page_loads_nothing_and_runs_no_text(session: ChunkKVSession) -> None:
    found = session.inspect(HOSTILE * 3 + PROMPT)
    page = render_page(found)
    assert page.count("<script") == 2 and page.count("</script") == 2
    assert page_data(page)["tokens"] == list(found.tokens)
    template = re.sub(r'(id="data">).*?(</script>)', r"\1\2", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://|import\(|fetch\(""", template)
    assert "default-src 'none'" in template


def test_a_page_is_written_whole_or_not_at_all(session: ChunkKVSession, tmp_path: Path, monkeypatch) -> None:
    inspection = session.inspect(PROMPT)
    write_page(inspection, tmp_path / "page.html")
    before = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert before == render_page(inspection)

    def interrupted(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_page(session.inspect(PROMPT + " more"), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes().decode() == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_command_writes_the_page(session: ChunkKVSession, tmp_path: Path, capsys) -> None:
    engine = engines.engine_dir("llama3", chunkkv_layer_reuse=2, max_seq_len=512)
    output = tmp_path / "kept.html"
    main(["inspect", "--engine_dir", str(engine), "--output", str(output), "--budget_tokens", "20", PROMPT])
    length = len(page_data(output.read_text(encoding="utf-8"))["tokens"])
    assert capsys.readouterr().out == f"{output}: 20 of {length} tokens kept\n"
    os.mkfifo(tmp_path / "pipe")  # no plain file, like a device: it must not be replaced
    main(
        ["inspect", "--engine_dir", str(engine), "--output", str(output), "--scorer", "reread", "--as_context", PROMPT]
    )
    assert page_data(output.read_text(encoding="utf-8"))["scorer"] == "reread"
    capsys.readouterr()
    for bad in (tmp_path, tmp_path / "no" / "page.html", tmp_path / "pipe"):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", "--engine_dir", str(engine), "--output", str(bad), PROMPT])
        assert stopped.value.code == 2 and "give a file name in a directory that exists" in capsys.readouterr().err
    assert not (tmp_path / "pipe").is_file()


HEADS = {
    "uniform": {},
    "each head": {"heads": "each"},
    "classes": CLASSES,
    "classes, each head": {**CLASSES, "heads": "each"},
    "classes, local by chunks": {**CLASSES, "local_policy": "chunks"},
    "ranked": {"budget_split": "ranked"},
    "ranked, each head": RANKED_HEADS,
}


@cache
def inspected(name: str, keep_ratio: float = 0.4) -> Inspection:
    """Return what an engine of these settings keeps of a prompt of 60 tokens."""
    return class_session(settings_of(**HEADS[name])).inspect([int(i) for i in range(3, 63)], keep_ratio)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_of_every_layer_is_told_once(name: str) -> None:
    """The entries together are the choice of every head, each with as many tokens as its class keeps."""
    found = inspected(name)
    lengths = None if name.startswith("ranked") else found.settings.class_lengths(60, 4_000)
    seen = []
    for group in found.groups:
        (layer,) = group.layers
        seen += [(layer, head) for head in group.kv_heads]
        assert group.kept_indices[0] == 0 and (np.diff(group.kept_indices) > 0).all()
        if lengths is not None:
            assert len(group.kept_indices) == lengths[-1 if group.head_class == "local" else 0]
        if group.head_class != "all":
            is_reading = [head in READING[layer] for head in group.kv_heads]
            assert set(is_reading) == {group.head_class == "reading"}
        recent = group.head_class == "local" and found.settings.local_policy == "recent"
        assert (len(group.chunk_starts) == 0) == recent
        if recent:
            assert group.kept_indices.tolist() == [0, 1, *range(60 - len(group.kept_indices) + 2, 60)]
    assert sorted(seen) == [(layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)]
    shares = found.keeping_shares()
    assert shares.shape == (60,) and shares[0] == shares[-1] == 1 and shares.min() < 1
    assert shares.sum() == pytest.approx(found.kept_tokens, abs=1)


def test_an_engine_without_chunkkv_has_nothing_to_show() -> None:
    with pytest.raises(EngineMismatchError, match=naming("without ChunkKV")):
        engines.session("llama3", chunkkv=False).inspect([5, 6, 7])


def test_bad_prompts_are_refused(session: ChunkKVSession) -> None:
    with pytest.raises(RequestError, match=naming("prompt 0 empty")):
        session.inspect("")


# --- In a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if not (CHROMIUM and CHROMEDRIVER):
        assert not os.environ.get("CI"), NO_BROWSER
        pytest.skip(NO_BROWSER)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium-profile")
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for switch in (*switches.split(), "disable-component-update", "disable-sync", f"user-data-dir={profile}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def show(browser, found: Inspection, folder: Path, size: tuple[int, int] = DESK) -> None:
    write_page(found, folder / "page.html")
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((folder / "page.html").as_uri())
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def highlighted(browser) -> list[int]:
    return browser.execute_script(
        "return spans.flatMap((s, t) => s.matches('.kept, .always') ? [t] : [])",
    )


@pytest.mark.browser
def test_every_group_highlights_what_the_engine_kept(browser, session: ChunkKVSession, tmp_path: Path) -> None:
    found = session.inspect(PROMPT)
    show(browser, found, tmp_path)
    rows = browser.find_elements("css selector", ".group")
    assert len(rows) == len(found.groups) == 2
    for row, group in zip(rows, found.groups, strict=True):
        row.find_element("tag name", "button").click()
        assert highlighted(browser) == group.kept_indices.tolist()
        assert row.get_attribute("aria-current") == "true"
        assert str(found.kept_tokens) in row.find_element("tag name", "output").text
    text = browser.find_element("id", "text").get_property("textContent")
    assert text.replace("↵\n", "\n") == "".join(found.tokens)
    assert f"{found.kept_tokens} of {len(found.tokens)}" in browser.find_element("tag name", "h1").text


def heats(browser) -> list[float]:
    return browser.execute_script("return spans.map(s => parseFloat(s.style.getPropertyValue('--heat')) / 60)")


@pytest.mark.browser
@pytest.mark.parametrize("name", HEADS)
def test_it_opens_on_all_layers(browser, name: str, tmp_path: Path) -> None:
    found = inspected(name)
    show(browser, found, tmp_path)
    lines = browser.find_elements("css selector", ".line")
    assert lines[0].get_attribute("aria-current") == "true" and "all layers" in lines[0].text
    shares = found.keeping_shares()
    assert heats(browser) == pytest.approx(shares.tolist(), abs=2e-3)
    assert highlighted(browser) == np.flatnonzero(shares).tolist()
    browser.find_elements("css selector", "#text .token")[1].click()
    heads = 1 if name in ("uniform", "ranked") else KV_HEADS
    assert f"kept by {LAYERS * heads} of {LAYERS * heads} " in browser.find_element("id", "facts").text
    rows = browser.find_elements("css selector", ".group")
    assert len(rows) == len(found.groups)
    for row, group in zip(rows, found.groups, strict=True):
        row.find_element("tag name", "button").click()
        assert highlighted(browser) == group.kept_indices.tolist()
        assert f"{len(group.kept_indices)} tokens" in row.find_element("tag name", "output").text
        if name.startswith(("ranked", "uniform")):
            assert ("ranked with all others" if "ranked" in name else "chooses for itself") in row.text
    classes = [line.text for line in lines if line.text.startswith(("reading heads", "local heads"))]
    assert len(classes) == (2 if "classes" in name else 0)


@pytest.mark.browser
def test_one_slider_moves_all_layers(browser, session: ChunkKVSession, tmp_path: Path) -> None:
    show(browser, session.inspect(PROMPT), tmp_path)
    slider = browser.find_element("css selector", ".several input")
    browser.execute_script("arguments[0].value = 40; arguments[0].dispatchEvent(new Event('input'))", slider)
    expected = session.inspect(PROMPT, budget_tokens=40)
    assert heats(browser) == pytest.approx(expected.keeping_shares().tolist(), abs=2e-3)
    for row, group in zip(browser.find_elements("css selector", ".group"), expected.groups, strict=True):
        assert row.find_element("tag name", "input").get_attribute("value") == "40"
        row.find_element("tag name", "button").click()
        assert highlighted(browser) == group.kept_indices.tolist()


@pytest.mark.browser
def test_sliders_choose_as_the_engine_would(browser, session: ChunkKVSession, tmp_path: Path) -> None:
    show(browser, session.inspect(PROMPT), tmp_path)
    sliders = browser.find_elements("css selector", ".group input[type=range]")
    for budget in (10, 11, 19, 40, 57):
        expected = session.inspect(PROMPT, budget_tokens=budget)
        for slider, group in zip(sliders, expected.groups, strict=True):
            browser.execute_script(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, budget
            )
            assert highlighted(browser) == group.kept_indices.tolist()
    sliders[0].send_keys("\ue014")  # the right arrow key
    assert len(highlighted(browser)) == 58
    assert "58 tokens" in browser.find_element("css selector", ".group output").text


@pytest.mark.browser
def test_hovering_shows_the_scores(browser, session: ChunkKVSession, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    found = session.inspect(PROMPT)
    show(browser, found, tmp_path)
    browser.find_element("css selector", ".group button").click()
    group = found.groups[0]
    position = int(group.chunk_starts[1]) + 1
    spans = browser.find_elements("css selector", "#text .token")
    ActionChains(browser).move_to_element(spans[position]).perform()
    facts = browser.find_element("id", "facts").text
    score, mean = (float(x) for x in re.findall(r"scores? ([\d.e+-]+)", facts))
    start, stop = (int(group.chunk_starts[k]) for k in (1, 2))
    assert score == pytest.approx(float(group.token_scores[position]), rel=1e-3)
    assert mean == pytest.approx(float(np.mean(group.token_scores[start:stop])), rel=1e-3)
    assert f"position {position}" in facts and f"chunk {start}–{stop - 1}" in facts
    assert ("dropped" in facts) == (position not in group.kept_indices)
    ActionChains(browser).move_to_element(spans[-1]).perform()
    assert "observation window · always kept" in browser.find_element("id", "facts").text


@pytest.mark.browser
def test_it_is_legible_on_a_phone(browser, session: ChunkKVSession, tmp_path: Path) -> None:
    show(browser, session.inspect(PROMPT + "x" * 60), tmp_path, PHONE)
    width, scroll, size = browser.execute_script(
        "return [innerWidth, document.documentElement.scrollWidth, parseFloat(getComputedStyle(spans[0]).fontSize)]"
    )
    assert (width, scroll) == (PHONE[0], PHONE[0]), "nothing is wider than the screen"
    assert size >= 16
    for element in browser.find_elements("css selector", ".line button, .line input, .line output, h1"):
        box = element.rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0] and box["height"] >= 16
    browser.find_elements("css selector", "#text .token")[8].click()
    facts = browser.find_element("id", "facts")
    assert "position 8" in facts.text
    assert facts.rect["height"] < PHONE[1] / 4


@pytest.mark.browser
def test_hostile_text_stays_text(browser, session: ChunkKVSession, tmp_path: Path) -> None:
    found = session.inspect(HOSTILE * 3)
    show(browser, found, tmp_path)
    assert browser.title == "ChunkKV: what is kept"
    assert browser.find_elements("css selector", "#text img, #text script") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    shown = browser.find_element("id", "text").get_property("textContent")
    assert shown.replace("↵\n", "\n") == "".join(found.tokens)


@pytest.mark.browser
def test_a_prompt_that_is_kept_whole_says_so(browser, session: ChunkKVSession, tmp_path: Path) -> None:
    found = session.inspect(PROMPT, keep_ratio=1.0)
    show(browser, found, tmp_path, PHONE)
    assert len(highlighted(browser)) == len(found.tokens)
    browser.find_elements("css selector", "#text .token")[3].click()
    assert "kept by 3 of 3 layers" in browser.find_element("id", "facts").text
    browser.find_element("css selector", ".group button").click()
    assert "nothing was scored" in browser.find_element("id", "facts").text
