"""Tests of search: equal to brute force, by faiss, on the command line and on the page."""

import http.client
import json
import shutil
import socket
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, probe
from data_cases import encode, make_image, write_shards
from embedded import SIDE, toy_encoders, toy_info, write_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import write_data

from clip_jax.data.shards import Handles
from clip_jax.data.sources import fingerprint
from clip_jax.embeddings.brute_force import brute_force_search, error_bound, inner_products
from clip_jax.embeddings.encode_query import (
    class_probabilities,
    encode_image_query,
    encode_text_query,
)
from clip_jax.embeddings.faiss_index import faiss_search, import_faiss, index_path, open_index
from clip_jax.embeddings.folder import begin_folder, open_embeddings
from clip_jax.embeddings.searcher import Hit, Searcher
from clip_jax.embeddings.write import embed, finish_folder, open_images
from clip_jax.errors import UserError, plain
from clip_jax.evaluation.encoders import unit_rows
from clip_jax.tools import embed as embed_command
from clip_jax.tools import search as command


def all_products(parts, query_QD, k):
    """Return all inner products in float64, sorted; of equal ones the first row first."""
    rows = np.concatenate(parts).astype(np.float64)
    scores = [(rows * q.astype(np.float64)).sum(axis=1) for q in query_QD]
    orders = [np.argsort(-s, kind="stable")[:k] for s in scores]
    return np.stack([s[o] for s, o in zip(scores, orders, strict=True)]), np.stack(orders)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    k=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    copies=st.floats(0, 1),
    block=st.sampled_from([1, 3, 16, 10_000]),
)
def test_exact_search_is_brute_force_ties_and_all(sizes, k, seed, copies, block):
    rng = np.random.default_rng(seed)
    z = unit_rows(rng.normal(size=(sum(sizes), 24))).astype(np.float16)
    # Equal rows in several blocks and parts, whose scores must be equal to the last bit.
    same = rng.random(len(z)) < copies
    z[same] = z[rng.integers(0, min(3, len(z)), same.sum())]
    parts = np.split(z, np.cumsum(sizes)[:-1])
    query = unit_rows(rng.normal(size=(3, 24)))
    scores, rows = brute_force_search(parts, query, k, block_rows=block)
    wanted_scores, wanted_rows = all_products(parts, query, k)
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_array_equal(scores, wanted_scores)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 700))
def test_no_float32_product_errs_by_more_than_the_bound(seed, dim):
    rng = np.random.default_rng(seed)
    rows, query = (rng.normal(size=(n, dim)).astype(np.float32) for n in (40, 1))
    error = np.abs(query @ rows.T - inner_products(rows, query[0]))
    assert error.max() < error_bound(rows, query[0])


def write_rows(folder, z, parts=1):
    for number, part in enumerate(np.array_split(z, parts)):
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / f"img_emb/img_emb_{number}.npy", part.astype(np.float16))
        table = pa.table({"image_path": [f"{number}/{i}" for i in range(len(part))]})
        pq.write_table(table, folder / f"metadata/metadata_{number}.parquet", row_group_size=7)
    return open_embeddings(folder)


MAX_UPLOAD = 1 << 20
needs_faiss = pytest.mark.skipif(import_faiss() is None, reason="faiss is not installed")


@needs_faiss
def test_faiss_finds_the_nearest_and_its_index_follows_the_embeddings(tmp_path):
    rng = np.random.default_rng(0)
    z, query = unit_rows(rng.normal(size=(9000, 32))), unit_rows(rng.normal(size=(20, 32)))
    embeddings = write_rows(tmp_path, z, parts=3)
    searcher = Searcher(embeddings, "faiss")
    wanted = brute_force_search(embeddings.parts, query, 10)
    faiss = faiss_search(open_index(embeddings), embeddings, query, 10)
    same = [np.isin(w, f).mean() for w, f in zip(wanted[1], faiss[1], strict=True)]
    # 512 candidates of 9,000: of these 200 nearest it finds all here, and must find nearly all.
    assert np.mean(same) > 0.98
    every = np.isin(faiss[1], wanted[1]) & (faiss[1] == wanted[1])
    assert (faiss[0][every] == wanted[0][every]).all()
    assert searcher.search(query[:1], 1)[0][0].metadata["image_path"].count("/") == 1
    # Stored, and not built again.
    written = index_path(embeddings).stat().st_mtime_ns
    open_index(open_embeddings(tmp_path))
    assert index_path(embeddings).stat().st_mtime_ns == written
    before = index_path(embeddings).read_bytes()
    changed = write_rows(tmp_path, unit_rows(rng.normal(size=(8000, 32))))
    (tmp_path / "img_emb/img_emb_1.npy").unlink()
    assert open_index(open_embeddings(tmp_path)).ntotal != 9000
    assert index_path(changed).read_bytes() != before
    index_path(changed).write_bytes(b"torn")
    assert open_index(open_embeddings(tmp_path)).ntotal > 0


def test_without_faiss_search_is_exact_and_asking_for_it_is_one_line(tmp_path, monkeypatch):
    embeddings = write_rows(tmp_path, np.eye(8), parts=2)
    monkeypatch.setitem(sys.modules, "faiss", None)
    searcher = Searcher(embeddings)
    assert searcher.method == "exact"
    (hits,) = searcher.search(np.eye(8, dtype=np.float32)[5:6], 3)
    assert [hit.row for hit in hits] == [5, 0, 1] and hits[0].metadata == {"image_path": "1/1"}
    assert len(searcher.search(np.eye(8, dtype=np.float32)[:1], 99)[0]) == 8
    with pytest.raises(UserError, match=r"clip-jax-research\[search\]"):
        Searcher(embeddings, "faiss")
    with pytest.raises(UserError, match="one of auto, faiss, exact"):
        Searcher(embeddings, "best")
    with pytest.raises(UserError, match="rows of 8 features and the model makes 4"):
        searcher.search(np.ones((1, 4), np.float32), 1)


def test_metadata_is_found_across_row_groups_and_parts(tmp_path):
    embeddings = write_rows(tmp_path, np.ones((45, 4)), parts=2)
    for row in (0, 6, 7, 22, 23, 29, 30, 44):
        part, offset = divmod(row, 23)
        assert embeddings.metadata(row) == {"image_path": f"{part}/{offset}"}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Return a folder with a model, its embeddings of a few drawings, and the drawings."""
    root = tmp_path_factory.mktemp("search")
    folder, pattern = write_data(root / "data", samples=24)
    model = write_tiny_model(root / "model", folder / "t.model")
    args = ["--model", str(model), "--data", pattern, "--out", str(root / "out")]
    result = embed_command.embed_source(embed_command.parse(args))
    assert result.rows == 48 and result.info.embed_dim == 16
    assert "48 images of 16 features" in embed_command.result_text(result)
    return root


def run(capsys, *args):
    assert command.main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_the_command_finds_what_was_embedded(embedded, capsys):
    row = 17
    with Handles() as handles:
        (shard, _) = open_images(str(embedded / "data"))
        (embedded / "one.png").write_bytes(shard.image(row, handles))
    text = run(capsys, embedded / "out", "--image", embedded / "one.png", "--json")
    hits = json.loads(text)
    assert len(hits) == 10 and hits[0]["index"] == hits[0]["row"] == row
    assert hits[0]["caption"] == "green dot" and abs(hits[0]["score"] - 1) < 2**-11
    text = run(capsys, embedded / "out", "red bar", "--among", "text", "--top", 4)
    lines = text.splitlines()
    assert len(lines) == 4 and all(line.endswith("red bar") for line in lines)


def test_a_model_that_was_named_from_another_folder_is_the_same(
    embedded, monkeypatch, capsys, tmp_path
):
    """Its tokenizer's file has another path then; the same file moved is the same, too."""
    pattern = str(embedded / "data/{00000..00001}.tar")
    monkeypatch.chdir(embedded)
    args = ["--model", "model", "--data", pattern, "--out", str(tmp_path / "out")]
    embed_command.embed_source(embed_command.parse(args))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(embedded / "model", tmp_path / "moved")
    text = run(capsys, "out", "red bar")
    assert text == run(capsys, "out", "red bar", "--model", "moved")
    assert len(text.splitlines()) == 10


def test_a_changed_model_and_wrong_queries_are_one_line(embedded, capsys, tmp_path):
    write_tiny_model(tmp_path / "other", embedded / "data/t.model", seed=1)
    out = str(embedded / "out")
    for args, message in (
        ([out, "red bar", "--model", str(tmp_path / "other")], "weights or settings"),
        ([out], "and not both"),
        ([out, "red", "--image", "x.png"], "and not both"),
        ([out, "--image", str(tmp_path / "no.png")], "cannot be read"),
        ([str(tmp_path), "red"], "holds no img_emb"),
        ([out, "red", "--top", "0"], "at least 1"),
        ([out, "red", "--serve"], "leave the query out"),
    ):
        with pytest.raises(UserError, match=message):
            run(capsys, *args)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more IEND")
    with pytest.raises(UserError, match="cannot be used"):
        run(capsys, out, "--image", str(tmp_path / "bad.png"))


def test_a_folder_of_clip_retrieval_needs_its_model_named(embedded, capsys, tmp_path):
    shutil.copytree(embedded / "out", tmp_path / "clip_retrieval")
    (tmp_path / "clip_retrieval/embedding.json").unlink()
    with pytest.raises(UserError, match="does not say what made it; give --model"):
        run(capsys, tmp_path / "clip_retrieval", "red bar")
    text = run(capsys, tmp_path / "clip_retrieval", "red bar", "--model", embedded / "model")
    assert text == run(capsys, embedded / "out", "red bar")


def test_probabilities_are_the_softmax_of_scaled_cosines():
    encoders = toy_encoders()
    z = encode_image_query(encoders, encode(make_image("RGB", 20, 20), "PNG"))
    labels = ["one", "two", "three"]
    texts = encode_text_query(encoders, [f"a {label}" for label in labels])
    logits = encoders.scale * (texts @ z[0]).astype(np.float64)
    wanted = np.exp(logits - logits.max())
    p = class_probabilities(encoders, z, labels, "a {}")
    # exp of logits up to 100, which float32 holds to 8e-6.
    np.testing.assert_allclose(p, wanted / wanted.sum(), rtol=1e-4)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Serve the page over toy embeddings, in a thread; yield (host, port)."""
    pytest.importorskip("starlette")
    uvicorn = pytest.importorskip("uvicorn")
    from clip_jax.search_page.app import make_app
    from clip_jax.search_page.connection import TimedConnection
    from clip_jax.search_page.thumbnails import Thumbnails

    root = tmp_path_factory.mktemp("page")
    write_shards(root, [30], side=SIDE)
    info = toy_info(str(root), fingerprint=fingerprint(open_images(str(root))))
    begin_folder(root / "out", info)
    embed(toy_encoders(), open_images(str(root)), info, root / "out", progress=False)
    finish_folder(root / "out", info)
    embeddings = open_embeddings(root / "out")
    app = make_app(
        Searcher(embeddings), toy_encoders(), Thumbnails(embeddings), max_upload=MAX_UPLOAD
    )
    listening = socket.create_server(("127.0.0.1", 0))
    # The websockets that it looks for are not used, and warn of themselves.
    config = uvicorn.Config(
        app,
        http=TimedConnection,
        log_level="error",
        ws="none",
        lifespan="off",
        timeout_keep_alive=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()
    server.should_exit = True
    thread.join()
    listening.close()


def ask(address, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data, response.headers


def test_the_server_answers_as_the_functions_do(address):
    encoders = toy_encoders()
    status, data, headers = ask(address, "GET", "/search?words=caption%207&top=5")
    hits = json.loads(data)["hits"]
    assert status == 200 and len(hits) == 5
    assert "default-src 'none'" in headers["content-security-policy"]
    data = encode(make_image("RGB", SIDE, SIDE + 3, seed=4), "PNG")
    status, answer, _ = ask(address, "POST", "/search?top=1", data)
    assert json.loads(answer)["hits"][0]["row"] == 4
    status, answer, _ = ask(address, "GET", "/search?row=4&top=1")
    assert json.loads(answer)["hits"][0] == {
        "row": 4, "score": pytest.approx(1, abs=2**-10), "caption": "caption 4",
        "path": "s-00000.tar/000004",
    }  # fmt: skip
    status, answer, _ = ask(address, "POST", "/classify?label=x&label=yy&template=a+{}", data)
    wanted = class_probabilities(encoders, encode_image_query(encoders, data), ["x", "yy"], "a {}")
    np.testing.assert_allclose(json.loads(answer)["probabilities"], wanted, rtol=1e-5)
    status, small, headers = ask(address, "GET", "/thumbnails/4")
    assert status == 200 and headers["content-type"] == "image/jpeg" and small[:2] == b"\xff\xd8"
    assert json.loads(ask(address, "GET", "/about")[1])["count"] == 30


def test_the_server_refuses_what_it_must(address):
    for path in ("/thumbnails/30", "/thumbnails/-1", "/thumbnails/99999999999999999999",
                 "/thumbnails/..%2f..%2fetc%2fpasswd", "/app.py",
                 "/../../../../etc/passwd"):  # fmt: skip
        assert ask(address, "GET", path)[0] == 404, path
    for path in ("/search?words=", "/search?words=" + "a" * 1001, "/search?row=30",
                 "/search?row=1e3", "/search?words=a&top=1000"):  # fmt: skip
        status, data, _ = ask(address, "GET", path)
        assert status == 400 and json.loads(data)["error"], path
    for path in ("/classify?row=1", "/classify?row=1&label=a&template=none", "/search"):
        assert ask(address, "POST", path, b"no image")[0] == 400, path
    # A page elsewhere that gives this machine a name of its own.
    assert ask(address, "GET", "/about", Host="evil.example")[0] == 400
    assert ask(address, "POST", "/search", bytes(MAX_UPLOAD + 1))[0] == 413
    # Few bytes that would become many pixels.
    bomb = encode(make_image("1", 8, 8).resize((10_000, 10_000)), "PNG")
    status, data, _ = ask(address, "POST", "/search", bomb)
    assert len(bomb) < MAX_UPLOAD and status == 400 and "too_large" in json.loads(data)["error"]


def test_only_its_own_page_may_ask(address):
    own = "{}:{}".format(*address)
    for headers, status in (
        ({"Origin": f"http://{own}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://127.0.0.1:{address[1] + 1}"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": f"http://{own}"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ):
        assert ask(address, "GET", "/search?words=a", **headers)[0] == status, headers
    data = encode(make_image("RGB", SIDE, SIDE), "PNG")
    assert ask(address, "POST", "/search", data, Origin="http://evil.example")[0] == 403
    # A link from elsewhere opens the page.
    assert ask(address, "GET", "/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200


def test_no_request_makes_a_500(address):
    many = "9" * 5000
    for path in (
        f"/thumbnails/{many}", "/thumbnails/%F0%9F", "/thumbnails/x", "/thumbnails/", "/%00", "//",
        "/search?words=%ED%A0%80", f"/search?words=%00&top={many}", "/search?%FF=%FF",
        f"/search?row={many}", "/search?words=a&words=b&row=", "/?" + "&" * 999,
    ):  # fmt: skip
        assert ask(address, "GET", path)[0] < 500, path
    for path, body in (
        ("/search", b""),
        ("/classify?label=" + "a&label=" * 300, b"x"),
        ("/classify?label=a&template={}{}{0}{x}", b"\x89PNG\r\n\x1a\n"),
    ):
        assert ask(address, "POST", path, body)[0] in (400, 413), path
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"):
        assert ask(address, method, "/search?words=a")[0] < 500, method
    # One that goes away in the middle of its image.
    with socket.create_connection(address) as gone:
        gone.sendall(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nx")
    assert ask(address, "GET", "/about")[0] == 200


def test_few_uploads_are_in_memory_at_a_time(address):
    head = b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nx"
    data = encode(make_image("RGB", SIDE, SIDE), "PNG")
    waiting = [socket.create_connection(address) for _ in range(4)]
    try:
        for connection in waiting:
            connection.sendall(head)
        end = time.monotonic() + 60
        while (status := ask(address, "POST", "/search", data)[0]) != 503:
            assert status == 200 and time.monotonic() < end
    finally:
        for connection in waiting:
            connection.close()
    while ask(address, "POST", "/search", data)[0] != 200:
        assert time.monotonic() < end


def answers(address, data):
    """Send bytes as they are; return the statuses of what comes until the server closes."""
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(data)
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


def test_a_broken_request_is_answered_once_and_a_slow_one_is_let_go(address, monkeypatch, capfd):
    from clip_jax.search_page import app, connection

    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(app, "STALL_SECONDS", 0.2)
    head = b" HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    # A chunk that is none, before the answer of the page, which must not follow.
    assert answers(address, b"POST /about" + chunked + b"zz\r\nab\r\n") == [400]
    assert answers(address, b"POST /search" + chunked + b"2\r\nab\r\nzz\r\n") == [400]
    assert answers(address, b"") == [] == answers(address, b"GET /about HTTP/1.1\r\nHost: 1")
    # Behind a whole request, in the same connection.
    assert answers(address, b"GET /about" + head + b"\r\nGET /ab") == [200]
    with monkeypatch.context() as patch:
        patch.setattr(app, "DROP_SECONDS", 0.2)
        assert answers(address, b"POST /search" + head + b"Content-Length: 9\r\n\r\nab") == [408]
    # An answer before the body has come reaches whoever sends it to its end first.
    body = bytes(8 << 20)
    close = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert answers(address, b"POST /search" + head + close + body) == [413]
    assert answers(address, b"GET /about/" + head + b"Connection: close\r\n\r\n") == [404]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("host", ["::1", "127.0.0.1", "localhost", "box.local"])
def test_a_host_is_known_as_browsers_write_it(host):
    pytest.importorskip("starlette")
    from clip_jax.search_page.guard import Guard, bracketed

    guard = Guard(None, hosts=["127.0.0.1", "localhost", host], public=["/"])

    def refused(name):
        scope = {"path": "/search", "headers": [(b"host", name.encode())]}
        return guard._refusal(scope) is not None

    name = bracketed(host)
    assert not refused(name) and not refused(f"{name}:8000") and not refused(name.upper())
    for other in ("evil.example", "", "[::1", "::1:8000", "[::2]:1", "localhost.evil:80", "a:b:c"):
        assert refused(other), other
    assert not Guard(None, hosts=["*"], public=[])._refusal({"path": "/", "headers": []})


def test_control_sequences_do_not_reach_a_terminal():
    metadata = {"image_path": "a\nb\x1b[2J", "caption": "x\x9b31m\u202ey\ttab"}
    hits = [Hit(3, 0.5, metadata)]
    shown = plain(command.hits_text(hits))
    assert shown == "  1   0.5000  a\\nb\\u001b[2J  x\\u009b31m\\u202ey\ttab"
    assert json.loads(plain(command.hits_json(hits)))[0]["caption"] == metadata["caption"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420])
def test_the_page_works_in_a_browser(address, tmp_path, width, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "query.png").write_bytes(encode(make_image("RGB", SIDE, SIDE + 3, seed=9), "PNG"))
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=120_000
        )
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(60_000)
        messages = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto("http://{}:{}/".format(*address))
        page.wait_for_selector('#about:has-text("30 images by toy")')
        page.get_by_label("By words").fill("caption 3")
        page.get_by_role("button", name="Search").click()
        page.wait_for_selector("#status:has-text('20 nearest to “caption 3”')")
        page.get_by_label("By an image").set_input_files(tmp_path / "query.png")
        page.wait_for_selector("#status:has-text('query.png')")
        assert page.locator(".hit .caption").first.inner_text() == "caption 9"
        page.get_by_role("button", name="more like it").nth(1).click()
        page.wait_for_selector("#status:has-text('caption')")
        page.get_by_role("button", name="Name it", exact=True).click()
        page.get_by_role("textbox", name="Labels").fill("<b>one</b>\ntwo\nthree words here")
        page.get_by_role("button", name="Name it", exact=True).click()
        page.wait_for_selector("#name-status.wrong:has-text('Choose an image')")
        page.get_by_role("button", name="name it", exact=True).first.click()
        page.get_by_role("button", name="Name it", exact=True).click()
        page.wait_for_selector(".bar >> nth=2")
        page.wait_for_load_state("networkidle")
        layout = page.evaluate(probe("section, label, button, .hit, .frame, .bar, img"))
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        percents = [float(x.split()[0]) for x in page.locator(".probability").all_inner_texts()]
        browser.close()
    assert messages == []
    assert layout["boxes"] > 80 and layout["wrong"] == []
    assert (paper == "rgb(20, 23, 27)") == (scheme == "dark")
    assert percents == sorted(percents, reverse=True) and abs(sum(percents) - 100) < 0.2


def test_a_taken_port_is_one_line():
    from clip_jax.search_page.serve import is_local, listen

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="choose another --port"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])
    assert [is_local(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "box")] == [
        True, True, True, False, False,
    ]  # fmt: skip


@needs_faiss
def test_the_benchmark_measures_both_methods(tmp_path, capsys):
    from benchmarks.search import main

    main(["--rows", "3000", "--dim", "32", "--queries", "3", "--repeats", "2", "--warmup", "0",
          "--out", str(tmp_path)])  # fmt: skip
    rows = json.loads((tmp_path / "search.json").read_text())["rows"]
    assert [(row["rows"], row["method"]) for row in rows] == [
        (kind, method) for kind in ("clustered", "uniform") for method in ("exact", "faiss")
    ]
    # 512 candidates of 3,000.
    assert all(row["recall@10"] > 0.9 for row in rows) and "ms a query" in capsys.readouterr().out
