"""The page in a real browser: headless Chromium."""

from __future__ import annotations

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, learning):
    """The page, opened; a message on its console or an error of its script fails the test."""
    opened = browser.new_page()
    said = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(learning.url)
    yield opened
    opened.close()
    assert said == []


def ask(page, user, count=4):
    expect(page.locator("#user")).not_to_have_value("")  # the script is ready
    page.fill("#user", str(user))
    page.fill("#count", str(count))
    page.fill("#context", '{"hour": 20}')
    page.click("form button")
    expect(page.locator("#result")).to_be_visible()


def test_a_person_sees_the_history_the_items_and_what_became_of_each_candidate(page, learning):
    ask(page, 3)
    assert learning.release.version in page.inner_text("#versions")
    assert "liked" in page.inner_text("#history")
    assert page.locator("#history .chip").first.inner_text().startswith("Item ")
    expect(page.locator("#items li")).to_have_count(4)
    expect(page.locator("#explored li")).to_have_count(2)
    assert page.locator("#stages tbody tr").first.inner_text().startswith("retrieval")
    became = [line.split("\t")[-1] for line in page.locator("#candidates tbody tr").all_inner_texts()]
    assert len(became) >= 20
    assert [line for line in became if line.startswith("shown")] == [f"shown at place {n}" for n in (1, 2, 3, 4)]
    assert any(line.startswith("fell out in final ranking: place 5, 4 are shown") for line in became)
    assert any(line.startswith("fell out in early ranking: place 11, 10 went on") for line in became)


def test_a_click_sends_feedback(page, learning):
    ask(page, 4)
    with page.expect_response("**/v1/feedback") as caught:
        page.click("#items li >> nth=0 >> text=I like it")
    assert caught.value.status == 200
    sent = caught.value.request.post_data_json["rewards"]
    assert [reward["reward"] for reward in sent] == [1]
    assert sent[0]["impression"].startswith(f"{learning.release.version}:")
    expect(page.locator("#items li").first.locator(".sent")).to_have_text("noted")
    expect(page.locator("#items li").first.locator("button")).to_have_count(0)


def test_a_user_of_whom_nothing_is_known_and_a_context_that_is_none(page):
    ask(page, 100_000)
    expect(page.locator("#history")).to_have_text("Nothing is known of this user.")
    expect(page.locator("#items li")).to_have_count(4)
    page.fill("#context", '{"age": 3')
    page.click("form button")
    expect(page.locator("#problem")).to_contain_text("JSON")
