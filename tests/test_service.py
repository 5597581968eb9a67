"The service and the widget: what they answer and to whom, a real server process, and both of them in a real browser."
import contextlib, hashlib, http.client, json, os, re, shutil, signal, socket, subprocess, sys, threading, time
import urllib.error, urllib.request
from urllib.parse import quote

import nbformat, pytest
from conftest import ROOT, wait_for
from test_browser import lab         # noqa: F401
from vae_nb.core import UserError
from vae_nb.reporting.report import find_chromium
from vae_nb.studies import service
from vae_nb.studies.runner import write_notebook
from vae_nb.studies.spec import Job
from vae_nb.studies.store import Store

pytest.importorskip('fastapi'); pytest.importorskip('anywidget')
from fastapi.testclient import TestClient    # noqa: E402

CHROMIUM = find_chromium()
try: from playwright.sync_api import expect, sync_playwright
except ImportError: sync_playwright = None
in_browser = [pytest.mark.skipif(CHROMIUM is None, reason='no Chromium or Chrome on this machine'),
              pytest.mark.skipif(sync_playwright is None, reason='playwright is not installed')]
SECRET = 'open-sesame-open-sesame'
EVIL = '<script>document.title="taken"</script>'

class Toy:
    "A store with a study of two configurations, and run folders."
    def __init__(self, root, study='toy', configurations=('plain', 'focal'), seeds=2):
        self.root, self.runs, self.study = root, root/'runs', study; self.runs.mkdir(exist_ok=True)
        (root/'settings.ini').write_text((ROOT/'settings.ini').read_text())
        self.file = self.runs/'studies.db'; self.store = Store(self.file)
        key = lambda c, s: hashlib.sha256(f'{study} {c} {s}'.encode()).hexdigest()[:12]
        self.store.add([Job(key(c, s), study, c, s, 'toy', dict(seed=s, epochs=3, weights=None, loss=c))
                        for s in range(seeds) for c in configurations])
        self.store.describe(study, dict(question='Does it help?', metric='nelbo', lower_is_better=True))
        self.keys = {(r.configuration, r.seed): r.key for r in self.store.runs(study)}

    def done(self, c, s, value, metric='nelbo'):
        self.store.finish(self.store.claim(self.keys[c, s]), 'done', 0, seconds=5., results=[{metric: value}])

    def failed(self, c, s, reason='cell error: ValueError: no data', log='Traceback\nValueError: no data'):
        self.store.finish(self.store.claim(self.keys[c, s]), 'failed', 1, reason, log, seconds=2.)

    def folder(self, c, s): p = self.runs/'toy'/self.keys[c, s]; p.mkdir(parents=True, exist_ok=True); return p

    def notebook(self, c, s, name='run.ipynb', html='<b>two</b>'):
        out = nbformat.v4.new_output('display_data', {'text/html': html})
        cells = [nbformat.v4.new_markdown_cell('# Toy ' + EVIL), nbformat.v4.new_code_cell('1 + 1', execution_count=1, outputs=[out])]
        for i, cell in enumerate(cells): cell['id'] = f'c{i}'
        nbformat.write(nbformat.v4.new_notebook(cells=cells), self.folder(c, s)/name)

    def client(self, **kw): return TestClient(service.make_app(self.file, self.runs, **kw), base_url='http://127.0.0.1')

@pytest.fixture
def toy(tmp_path):
    t = Toy(tmp_path); t.done('plain', 0, 70.5); t.failed('focal', 0); return t

# ---- answers

def test_answers_are_what_they_are_said_to_be(toy):
    c = toy.client(); o = service.Overview(**c.get('/api/validation/runs/toy').json())
    s = service.Stats(**c.get('/api/validation/stats/toy').json())
    assert o.counts == dict(pending=2, done=1, failed=1) and [r.state for r in o.runs] == ['done', 'failed', 'pending', 'pending']
    assert [(r.configuration, r.n, r.failed) for r in s.rows] == [('plain', 1, 0), ('focal', 0, 1)]
    assert s.rows[0].sd is None                                     # one seed has no spread; JSON has no NaN
    assert [service.StudyLine(**x).cells for x in c.get('/api/studies').json()] == [4]

def test_etag(toy):
    c = toy.client()
    for what in ('runs', 'stats'):
        url = f'/api/validation/{what}/toy'; first = c.get(url); tag = first.headers['etag']
        for said in (tag, f'W/{tag}', f'"other", {tag}', '*'):
            again = c.get(url, headers={'If-None-Match': said})
            assert (again.status_code, again.content, again.headers['etag']) == (304, b'', tag)
        assert toy.client().get(url).headers['etag'] == tag         # of the content: it outlives the process
    toy.done('plain', 1, 71.)
    for what in ('runs', 'stats'):
        new = c.get(f'/api/validation/{what}/toy', headers={'If-None-Match': tag})
        assert new.status_code == 200 and new.headers['etag'] != tag and new.json()['version'] == toy.store.version

def test_a_heartbeat_is_shown_and_costs_no_statistics(toy, monkeypatch):
    counted = []; real = service.stats; monkeypatch.setattr(service, 'stats', lambda *a: counted.append(1) or real(*a))
    c = toy.client(); a = toy.store.claim(toy.keys['plain', 1]); old = c.get('/api/validation/stats/toy').json()
    toy.store.beat(a, .4); new = c.get('/api/validation/stats/toy').json()
    assert c.get('/api/validation/runs/toy').json()['runs'][2]['progress'] == .4
    assert new == old | dict(version=new['version']) and new['version'] > old['version'] and counted == [1]
    toy.store.finish(a, 'done', 0, results=[dict(nelbo=70.)]); assert c.get('/api/validation/stats/toy').json()['rows'][0]['n'] == 2
    for _ in range(3): c.get('/api/validation/stats/toy')
    assert counted == [1, 1]

def test_a_worker_that_fell_silent_is_seen_though_nobody_wrote(toy):
    c = toy.client(); toy.store.claim(toy.keys['plain', 1], lease=.3)
    assert c.get('/api/validation/runs/toy').json()['counts']['running'] == 1
    time.sleep(.4); assert c.get('/api/validation/runs/toy').json()['counts']['stale'] == 1

def test_logs(toy):
    c = toy.client(); url = lambda c, s: f'/api/validation/log/toy/{toy.keys[c, s]}'
    assert c.get(url('focal', 0)).json() == dict(key=toy.keys['focal', 0], reason='cell error: ValueError: no data',
                                                 text='Traceback\nValueError: no data', params=dict(loss='focal'))
    assert c.get(url('plain', 1)).json()['text'] == ''
    (toy.folder('focal', 0)/'run.log').write_bytes(b'x'*100_000 + b'\xff\nthe end\n')
    text = c.get(url('focal', 0)).json()['text']; assert text.endswith('the end\n') and len(text) <= 8000

def test_parameters_that_set_a_configuration_apart(toy):
    told = lambda study, key: toy.client().get(f'/api/validation/log/{study}/{key}').json()['params']
    assert told('toy', toy.keys['plain', 1]) == dict(loss='plain')
    alone = Toy(toy.root, 'alone', configurations=('one',))         # nothing to differ from: all of them
    assert told('alone', alone.keys['one', 0]) == dict(epochs=3, weights=None, loss='one')

def test_large_answers_are_packed_and_events_are_not(tmp_path, server):
    t = Toy(tmp_path, configurations=[f'depth={i}' for i in range(100)], seeds=20); t.done('depth=0', 0, 1.); c = t.client()
    url = '/api/validation/runs/toy'; plain, packed = (c.get(url, headers={'Accept-Encoding': e}) for e in ('identity', 'gzip, br'))
    assert 'content-encoding' not in plain.headers and packed.headers['content-encoding'] == 'gzip' and plain.json() == packed.json()
    assert int(packed.headers['content-length']) < .2*int(plain.headers['content-length']) and packed.headers['vary'] == 'Accept-Encoding'
    for tag in (plain.headers['etag'], packed.headers['etag']): assert c.get(url, headers={'If-None-Match': tag}).status_code == 304
    host, port, _ = server(t); h = http.client.HTTPConnection(host, port, timeout=10)
    h.request('GET', '/events/toy', headers={'Accept-Encoding': 'gzip'}); r = h.getresponse()
    assert r.getheader('content-encoding') is None and r.readline() == b'event: change\n'; h.close()

def test_notebook_is_shown_without_what_acts(toy):
    c = toy.client(); url = f"/notebook/toy/{toy.keys['plain', 0]}"
    missing = c.get(url); assert missing.status_code == 404 and 'has no executed notebook' in missing.text
    toy.notebook('plain', 0, html=f'<b onclick="x()">two</b>{EVIL}<img src="https://e.org/p.png"><a href="java&#x0A;script:x()">a</a>')
    r = c.get(url); page = r.text; assert r.status_code == 200 and '>two</b>' in page
    for bad in ('<script', 'onclick', 'e.org', 'script:x', 'cdnjs', '<iframe'): assert bad not in page, bad
    policy = r.headers['content-security-policy']
    assert "default-src 'none'" in policy and 'sandbox' in policy and 'script-src' not in policy
    for name in ('run.failed.ipynb', 'run.running.ipynb'):
        (toy.folder('plain', 0)/'run.ipynb').unlink(missing_ok=True); toy.notebook('focal', 0, name, html='<i>other</i>')
        assert 'other' in c.get(f"/notebook/toy/{toy.keys['focal', 0]}").text; (toy.folder('focal', 0)/name).unlink()

def test_notebook_that_is_half_written_is_read_again(toy):
    c = toy.client(); toy.notebook('plain', 0, 'run.running.ipynb'); p = toy.folder('plain', 0)/'run.running.ipynb'
    whole = p.read_text(); p.write_text(whole[:200]); threading.Timer(.6, p.write_text, [whole]).start()
    assert '>two</b>' in c.get(f"/notebook/toy/{toy.keys['plain', 0]}").text

def test_openapi_is_complete(toy):
    spec = toy.client().get('/openapi.json').json(); models = spec['components']['schemas']
    want = {'/api/validation/runs/{study}': 'Overview', '/api/validation/stats/{study}': 'Stats',
            '/api/validation/log/{study}/{key}': 'Log'}
    for path, model in want.items():
        r = spec['paths'][path]['get']['responses']
        assert r['200']['content']['application/json']['schema']['$ref'].endswith(f'/{model}') and '404' in r
    assert {'/api/studies', '/events/{study}', '/notebook/{study}/{key}'} <= set(spec['paths'])
    fields = 'study version question metric lower_is_better configurations seeds counts runs'
    assert set(models['Overview']['properties']) == set(fields.split())
    assert 'text/event-stream' in spec['paths']['/events/{study}']['get']['responses']['200']['content']
    assert toy.client().get('/docs').status_code == 200

# ---- to whom

def test_unknown_names(toy):
    c = toy.client(); other = Toy(toy.root, 'other').keys['plain', 0]; key = toy.keys['plain', 0]
    for path in ('api/validation/runs', 'api/validation/stats', 'events'):
        r = c.get(f'/{path}/toi'); assert r.status_code == 404 and "Did you mean 'toy'?" in r.json()['detail']
    for bad in ('0'*12, other, key[:11], key + '0', key.upper(), 'run.log'):
        if bad == key: continue
        for path in ('api/validation/log/toy', 'notebook/toy'): assert c.get(f'/{path}/{bad}').status_code == 404, bad

TRAVERSALS = ['..', '../..', '%2e%2e', '%2e%2e%2f%2e%2e%2fsecret', '..%2f..%2fsecret', '%2e%2e/%2e%2e/secret', '%252e%252e%252fsecret',
              '/etc/passwd', '%2fetc%2fpasswd', '..%5c..%5csecret', '%00', 'toy%00', '....//secret', '%c0%ae%c0%ae/secret']

def test_no_way_out_of_the_runs(toy, server):
    "Sent as they are: a client library would tidy them up."
    (toy.root/'secret').mkdir(); (toy.root/'secret'/'run.log').write_text('SECRET'); (toy.root/'secret.ipynb').write_text('SECRET')
    host, port, _ = server(toy); key = toy.keys['plain', 0]
    for t in TRAVERSALS:
        for path in (f'/api/validation/log/toy/{t}', f'/api/validation/log/{t}/{key}', f'/notebook/toy/{t}', f'/notebook/{t}/{key}',
                     f'/static/{t}', f'/api/validation/runs/{t}', f'/events/{t}', f'/{t}'):
            h = http.client.HTTPConnection(host, port, timeout=10); h.putrequest('GET', path); h.endheaders()
            r = h.getresponse(); assert r.status == 404 and b'SECRET' not in r.read(), (path, r.status); h.close()

def test_links_that_lead_out_are_not_followed(toy):
    c = toy.client(); out = toy.root/'secret'; out.mkdir(); (out/'run.log').write_text('SECRET'); toy.notebook('focal', 1)
    key = toy.keys['plain', 0]
    shutil.copy(toy.folder('focal', 1)/'run.ipynb', out/'run.ipynb')
    (toy.runs/'toy'/key).symlink_to(out)                                                       # the folder is elsewhere
    for path in ('api/validation/log', 'notebook'):
        r = c.get(f'/{path}/toy/{key}'); assert r.status_code == 404 and 'outside' in r.text and 'SECRET' not in r.text
    (toy.runs/'toy'/key).unlink(); (toy.runs/'toy'/key).mkdir()
    for name in ('run.log', 'run.ipynb'): (toy.runs/'toy'/key/name).symlink_to(out/name)         # the file is
    for path in ('api/validation/log', 'notebook'): assert c.get(f'/{path}/toy/{key}').status_code == 404
    moved = toy.root/'elsewhere'; toy.runs.rename(moved); toy.runs.symlink_to(moved)           # but the whole folder of runs may be
    c = TestClient(service.make_app(moved/'studies.db', toy.runs)); assert c.get(f"/notebook/toy/{toy.keys['focal', 1]}").status_code == 200

def test_a_store_that_names_a_strange_notebook(toy):
    key = toy.keys['plain', 0]; (toy.root/'secret').mkdir()
    for name in ('../../secret', '..', '/etc', ''):
        toy.store.rows('update jobs set notebook = ? where key = ?', name, key)
        for path in ('api/validation/log', 'notebook'): assert toy.client().get(f'/{path}/toy/{key}').status_code == 404, name

def test_token(toy):
    c = toy.client(token=SECRET); key = toy.keys['plain', 0]
    paths = ['/', '/api/studies', '/api/validation/runs/toy', '/api/validation/stats/toy', f'/api/validation/log/toy/{key}',
             f'/notebook/toy/{key}', '/events/toy', '/openapi.json', '/docs', '/nothing', '/static/', '/static/../api/studies']
    for p in paths:
        for bad in ({}, dict(params=dict(token='wrong')), dict(params=dict(token='')), dict(params=dict(token='ü')),
                    dict(headers=dict(Authorization='Bearer wrong')), dict(headers=dict(Authorization=SECRET))):
            r = c.get(p, **bad); assert r.status_code == 401 and SECRET not in r.text, (p, bad)
    for p in paths[:5]:
        for good in (dict(params=dict(token=SECRET)), dict(headers=dict(Authorization=f'Bearer {SECRET}'))):
            assert c.get(p, **good).status_code == 200, p
    for p in ('/static/component.js', '/static/page.js'): assert c.get(p).status_code == 200     # the code is no secret

def test_host_names(toy):
    c = toy.client(hosts={'127.0.0.1', 'localhost', '::1'})
    for good in ('127.0.0.1', '127.0.0.1:8321', 'localhost:1', 'LOCALHOST', '[::1]:8321'):
        assert c.get('/api/studies', headers=dict(host=good)).status_code == 200, good
    for bad in ('evil.org', 'evil.org:8321', '127.0.0.1.evil.org', 'localhost.evil.org', '', '127.0.0.1:8321@evil.org'):
        r = c.get('/api/studies', headers=dict(host=bad)); assert r.status_code == 403 and 'host name' in r.json()['detail'], bad

def test_headers_and_methods(toy):
    c = toy.client()
    for p in ('/', '/api/studies', '/static/page.js', '/nothing'):
        h = c.get(p).headers; assert h['x-content-type-options'] == 'nosniff' and h['referrer-policy'] == 'no-referrer'
        assert 'access-control-allow-origin' not in h
    assert "script-src 'self'" in c.get('/').headers['content-security-policy']
    for method in ('post', 'put', 'delete', 'patch'): assert getattr(c, method)('/api/validation/runs/toy').status_code == 405

def test_the_store_is_never_written(toy):
    before = toy.store.version; c = toy.client()
    for p in ('/api/studies', '/api/validation/runs/toy', '/api/validation/stats/toy'): c.get(p)
    assert toy.store.version == before
    with pytest.raises(UserError, match='could not be written'): service.Reader(toy.file).claim(toy.keys['plain', 1])
    os.rename(toy.file, toy.root/'away.db'); r = c.get('/api/validation/runs/toy'); assert r.status_code == 503 and 'detail' in r.json()

# ---- a process

def said(*args, env=None, cwd=None, **kw):
    "What `serve` says when it does not start: the one sentence of its error."
    code = (f"from vae_nb.studies.service import serve\nfrom vae_nb.core import UserError\ntry: serve(**{kw!r})\n"
            "except UserError as e: print('refused:', e)")
    r = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=_env() | (env or {}), capture_output=True, text=True, timeout=60)
    assert r.returncode == 0, r.stderr
    return r.stdout

def _env(): return {k: v for k, v in os.environ.items() if k != 'VAE_NB_TOKEN'} | dict(OMP_NUM_THREADS='1')

@pytest.fixture
def server():
    "A function that starts `serve` in a process of its own; gives host, port and the process."
    started = []
    def start(toy, env=None, **kw):
        code = f'from vae_nb.studies.service import serve\nserve(**{dict(dict(port=0), **kw)!r})'
        p = subprocess.Popen([sys.executable, '-c', code], cwd=toy.root,
                             env=_env() | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(p); line = p.stdout.readline(); m = re.search(r'http://([\w.]+):(\d+)/', line)
        assert m, line or p.stderr.read()
        p.line = line; return m[1], int(m[2]), p
    yield start
    for p in started: p.kill(); p.wait(10); p.stdout.close(); p.stderr.close()

@pytest.fixture
def site():
    "A function that serves a toy in a thread of this process, which starts sooner; gives the address."
    import uvicorn
    running = []
    def start(toy):
        s = service.listen('127.0.0.1', 0); app = service.make_app(toy.file, toy.runs, closing=lambda: u.should_exit)
        u = uvicorn.Server(uvicorn.Config(app, log_level='warning', lifespan='off'))
        th = threading.Thread(target=u.run, args=([s],)); th.start()
        running.append((u, th, s)); return f'http://127.0.0.1:{s.getsockname()[1]}/'
    yield start
    for u, th, s in running: u.should_exit = True; th.join(10); s.close()

class Events:
    "The lines of an event stream as they come, read in a thread."
    def __init__(self, host, port, path):
        self.lines = []; self.answer = urllib.request.urlopen(f'http://{host}:{port}{path}', timeout=60)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with contextlib.suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
            self.lines.extend(iter(self.answer.readline, b''))
        self.lines.append(b'(end)')

    def count(self): return sum(l == b'event: change\n' for l in self.lines)

def test_events(toy, server):
    host, port, p = server(toy); e = Events(host, port, '/events/toy')
    assert e.answer.headers['content-type'].startswith('text/event-stream')
    wait_for(lambda: e.count() == 1, 10, 'the first event'); time.sleep(1.5); assert e.count() == 1          # nothing changed, nothing said
    a = toy.store.claim(toy.keys['plain', 1]); wait_for(lambda: e.count() == 2, 10, 'an event')
    toy.store.beat(a, .5); wait_for(lambda: e.count() == 3, 10, 'an event of a heartbeat')
    data = [json.loads(l[6:]) for l in e.lines if l.startswith(b'data: ')]; assert len({d['stamp'] for d in data}) == 3
    e.answer.close()

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_with_a_stream_open(toy, server, sig):
    host, port, p = server(toy); e = Events(host, port, '/events/toy'); wait_for(lambda: e.count() == 1, 10)
    p.send_signal(sig); started = time.time(); p.wait(10); assert time.time() - started < 3
    assert p.returncode == (0 if sig == signal.SIGINT else -signal.SIGTERM) and p.stderr.read() == ''
    wait_for(lambda: e.lines[-1] == b'(end)', 5, 'the end of the stream')
    service.listen(host, port).close()                                                          # the port is free again

def test_a_visitor_that_goes_away_ends_its_stream(toy, server):
    host, port, p = server(toy); fds = lambda: len(os.listdir(f'/proc/{p.pid}/fd'))
    if not os.path.exists(f'/proc/{p.pid}/fd'): pytest.skip('no /proc')
    wait_for(lambda: fds() and urllib.request.urlopen(f'http://{host}:{port}/api/studies').status == 200); before = fds()
    streams = [Events(host, port, '/events/toy') for _ in range(5)]; wait_for(lambda: all(e.count() for e in streams))
    assert fds() >= before + 3               # before may count a connection or two that were about to close
    for e in streams: e.answer.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: fds() <= before + 1, 30, 'an end of the connections')

def test_refusals_are_one_sentence(toy, server):
    for host in ('0.0.0.0', '::'):
        if host == '::' and not socket.has_ipv6: continue
        with pytest.raises(UserError, match='Others could read the runs.*VAE_NB_TOKEN'): service.listen(host, 0)
    out = said(host='0.0.0.0', port=0, token='short', cwd=toy.root); assert 'shorter than 16' in out and out.count('\n') == 1
    _, port, _ = server(toy); refused = lambda match: pytest.raises(UserError, match=match)
    with refused(f'Port {port} at 127.0.0.1 is in use'): service.serve(port=port)
    with refused('no address to listen on'): service.serve('no.such.host.invalid')
    with refused('is not a whole number'): service.serve(port=70000)
    with refused('There is no store of studies'): service.serve(port=0, store=toy.root/'none.db')
    (toy.root/'bad.db').write_text('hello'*1000)
    with refused('is not a store of studies'): service.serve(port=0, store=toy.root/'bad.db')

def test_it_says_what_is_missing(toy, tmp_path):
    (tmp_path/'fake').mkdir(); (tmp_path/'fake'/'fastapi.py').write_text("raise ImportError(name='fastapi')")
    out = said(port=0, cwd=toy.root, env=dict(PYTHONPATH=str(tmp_path/'fake'))); assert "pip install 'vae_nb[service]'" in out, out

def test_a_token_of_the_environment_opens_it_to_others(toy, server):
    _, port, p = server(toy, env=dict(VAE_NB_TOKEN=SECRET), host='0.0.0.0'); url = f'http://127.0.0.1:{port}/api/studies'
    assert f'?token={SECRET}' in p.line and urllib.request.urlopen(f'{url}?token={quote(SECRET)}').status == 200
    with pytest.raises(urllib.error.HTTPError) as e: urllib.request.urlopen(url)
    assert e.value.code == 401

# ---- the widget, without a browser

def test_widget_has_two_faces_and_ends(toy):
    from vae_nb.studies.widget import MatrixWidget
    w = MatrixWidget('toy', toy.store, toy.runs, every=.1); data, _ = w._repr_mimebundle_()
    assert 'application/vnd.jupyter.widget-view+json' in data and '<script' not in data['text/html'] and 'focal' in data['text/html']
    toy.done('plain', 1, 70.); wait_for(lambda: w.overview['counts'].get('done') == 2, 10); w.asked = toy.keys['focal', 0]
    wait_for(lambda: 'ValueError' in w.log.get('text', ''), 30); w.close(); wait_for(lambda: not w.thread.is_alive(), 5)

def test_nbconvert_shows_the_still_of_an_executed_notebook(toy):
    "As our runner leaves it: the state of widgets is not stored."
    from nbconvert import HTMLExporter
    from vae_nb.studies.widget import MatrixWidget
    w = MatrixWidget('toy', toy.store, toy.runs); out = nbformat.v4.new_output('display_data', w._repr_mimebundle_()[0]); w.close()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('w', execution_count=1, outputs=[out])])
    assert 'class="vnb-still"' in HTMLExporter().from_notebook_node(nb)[0]

def test_widget_rests_when_nobody_looks(toy):
    from vae_nb.studies.widget import MatrixWidget
    w = MatrixWidget('toy', toy.store, toy.runs, every=.05); done = lambda: w.overview['counts'].get('done')
    for view in (1, 1, -1, -1): w._heard(w, dict(view=view), [])
    time.sleep(.3); toy.done('plain', 1, 70.); time.sleep(.5); assert done() == 1
    w._heard(w, dict(view=1), []); wait_for(lambda: done() == 2, 30); w.close()

def test_a_run_for_the_record_keeps_the_still(toy, monkeypatch):
    from vae_nb.reporting.promote import slim_notebook
    from vae_nb.studies.widget import show_matrix
    shown = []; monkeypatch.setattr('IPython.display.display', shown.append); monkeypatch.setenv('VAE_NB_RUN', str(toy.folder('plain', 0)))
    show_matrix('toy', toy.file, toy.runs); out = dict(output_type='display_data', metadata={}, data={'text/html': shown[0].data})
    nb = slim_notebook(dict(metadata={}, cells=[dict(cell_type='code', outputs=[out])]), 'figures')
    assert 'class="vnb-still"' in nb['cells'][0]['outputs'][0]['data']['text/html']

def test_the_command_and_the_page_use_the_same_signs():
    from vae_nb.study import signs
    from vae_nb.studies.widget import LOOKS
    assert {s: sign for s, (sign, *_) in LOOKS.items()} == signs

def test_still_has_a_legend(toy):
    from bs4 import BeautifulSoup
    from vae_nb.studies.results import overview, stats
    from vae_nb.studies.widget import MEANS, matrix_html
    legend = BeautifulSoup(matrix_html(overview(toy.store, 'toy'), stats(toy.store, 'toy')), 'html.parser').find('p', 'l').get_text()
    assert all(f'{s}: {x}' in legend for s, x in MEANS.items())

def test_still_of_a_large_study_is_small(tmp_path):
    from vae_nb.studies.results import overview, stats
    from vae_nb.studies.widget import matrix_html
    t = Toy(tmp_path, configurations=[f'depth={i}' for i in range(100)], seeds=20); t.done('depth=0', 0, 1.)
    assert len(matrix_html(overview(t.store, 'toy'), stats(t.store, 'toy'))) < 120_000

def test_still_escapes_and_has_no_script(tmp_path):
    from vae_nb.studies.results import overview, stats
    from vae_nb.studies.widget import matrix_html
    names = (EVIL, '"><img src=x onerror=alert(1)>', "' onmouseover='x()"); t = Toy(tmp_path, configurations=names)
    t.done(EVIL, 0, 70., EVIL); t.failed(names[1], 0, reason=f'cell error: {EVIL}')
    t.store.describe('toy', dict(question=EVIL, metric=EVIL))
    page = matrix_html(overview(t.store, 'toy'), stats(t.store, 'toy'))
    assert '<script' not in page and '<img' not in page and '&lt;script&gt;' in page
    from bs4 import BeautifulSoup
    tags = BeautifulSoup(page, 'html.parser').find_all(True)
    assert not [(x.name, k) for x in tags for k in x.attrs if k.startswith('on')]
    assert not {x.name for x in tags} & {'script', 'img', 'iframe', 'a'}

# ---- in a browser

def shot(page, name):
    if os.environ.get('VAE_NB_SCREENSHOTS'): page.screenshot(path=f"{os.environ['VAE_NB_SCREENSHOTS']}/{name}.png", full_page=True)

@contextlib.contextmanager
def browsing(height=1000, **kw):
    "A page; at its end, no script may have failed in it."
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1280, height=height), **kw); page.wrong = []
        page.on('pageerror', lambda e: page.wrong.append(str(e)))
        try: yield page
        finally: browser.close()

class TestPage:
    pytestmark = in_browser

    def test_it_lives(self, toy, server):
        toy.notebook('focal', 0, 'run.failed.ipynb', html=f'<b>two</b>{EVIL}'); host, port, p = server(toy, token=SECRET)
        outside = []
        with browsing() as page:
            own = (f'http://{host}:{port}/', 'data:')
            page.on('request', lambda r: None if r.url.startswith(own) else outside.append(r.url))
            page.goto(p.line.split()[4]); cell = lambda c, s: page.get_by_role('button', name=f'{c}, seed {s}: ')
            expect(page.locator('button.cell')).to_have_count(4)
            expect(cell('plain', 0)).to_have_text('✓'); expect(cell('focal', 0)).to_have_text('✗')
            page.evaluate('window.same = true'); a = toy.store.claim(toy.keys['plain', 1]); toy.store.beat(a, .5)
            expect(cell('plain', 1)).to_have_class(re.compile('s-running'), timeout=30_000)
            expect(cell('plain', 1).locator('i')).to_have_attribute('style', re.compile('50%')); shot(page, 'page-running')
            toy.store.finish(a, 'done', 0, results=[dict(nelbo=70.1)]); expect(cell('plain', 1)).to_have_text('✓', timeout=30_000)
            expect(page.locator('.summary tbody tr').first).to_contain_text('70.30')
            assert page.evaluate('window.same')                                                         # without a reload
            cell('focal', 0).click(); panel = page.locator('.panel')
            expect(panel.locator('pre')).to_contain_text('ValueError: no data'); expect(panel).to_contain_text('cell error')
            expect(panel.locator('dl')).to_contain_text('loss=focal'); shot(page, 'page-panel')
            with page.expect_popup() as popup: panel.get_by_role('link', name='Executed notebook').click()
            expect(popup.value.get_by_text('two', exact=True)).to_be_visible(); assert popup.value.title() != 'taken'
            page.keyboard.press('Escape'); expect(panel).to_be_hidden(); assert not page.wrong, page.wrong
        assert not outside

    def test_marks_are_explained_and_a_cell_that_waits_says_so(self, toy, site):
        toy.store.rows('update jobs set cancelled = 1 where key = ?', toy.keys['focal', 1])
        with browsing() as page:
            page.goto(site(toy)); legend = page.locator('.legend'); expect(legend).to_contain_text('stale: its worker fell silent')
            expect(legend.locator('.cell')).to_have_text(['·', '▶', '✓', '✗', '?', '–'])
            page.locator('button.s-pending').click(); log = page.locator('.panel pre'); expect(log).to_have_text('(not started yet)')
            expect(page.locator('.panel dl')).to_contain_text('loss=plain'); shot(page, 'page-pending')
            a = toy.store.claim(toy.keys['plain', 1]); expect(log).to_have_text('(nothing was printed)', timeout=30_000)
            toy.store.finish(a, 'cancelled'); expect(log).to_have_text('(not started again yet)', timeout=30_000)
            page.locator('button.s-cancelled').click(); expect(log).to_have_text('(called off before it started)'); assert not page.wrong
            out = toy.root/'secret'; out.mkdir(); (toy.runs/'toy').mkdir(exist_ok=True)
            folder = toy.folder('plain', 0); shutil.rmtree(folder, ignore_errors=True); folder.symlink_to(out)    # no log may be shown
            page.get_by_role('button', name='plain, seed 0: ').click(); expect(log).to_contain_text('outside')

    def test_keys_reach_every_cell(self, toy, site):
        with browsing() as page:
            page.goto(site(toy)); first = page.locator('button.cell').first; first.wait_for(); page.keyboard.press('Tab')
            for _ in range(5):
                if page.evaluate('document.activeElement.classList.contains("cell")'): break
                page.keyboard.press('Tab')
            expect(first).to_be_focused(); page.keyboard.press('ArrowRight'); page.keyboard.press('ArrowDown')
            at = page.get_by_role('button', name='focal, seed 1: '); expect(at).to_be_focused(); page.keyboard.press('Enter')
            expect(page.locator('.panel strong')).to_have_text('focal, seed 1'); page.keyboard.press('Escape'); expect(at).to_be_focused()

    def test_names_are_text(self, tmp_path, site):
        t = Toy(tmp_path, configurations=(EVIL, '<img src=x onerror=document.title="taken">')); t.done(EVIL, 0, 1., EVIL)
        t.failed(EVIL, 1, EVIL, EVIL)
        t.store.describe('toy', dict(question=EVIL, metric=EVIL))
        with browsing() as page:
            page.goto(site(t)); page.locator('button.s-failed').first.click()
            expect(page.locator('.panel pre')).to_have_text(EVIL); expect(page.locator('.panel dl')).to_contain_text(f'loss={EVIL}')
            expect(page.locator('.matrix th[title]').first).to_have_text(EVIL)
            expect(page.locator('.summary svg').first).to_be_visible()
            assert page.title() != 'taken' and page.locator('.vnb script, .vnb img').count() == 0 and not page.wrong

    def test_a_hundred_by_twenty_scrolls(self, tmp_path, site):
        t = Toy(tmp_path, configurations=[f'lr=1e-{i % 5}, depth={i}' for i in range(100)], seeds=20); t.done('lr=1e-0, depth=0', 0, 1.)
        with browsing() as page:
            page.goto(site(t)); expect(page.locator('button.cell')).to_have_count(2000, timeout=20_000)
            box = page.locator('.box').first; assert box.evaluate('e => e.scrollHeight > e.clientHeight && e.clientHeight <= 442')
            box.evaluate('e => e.scrollTop = 1e6'); expect(page.get_by_role('button', name='depth=99, seed 19')).to_be_in_viewport()
            expect(page.locator('.matrix thead th').first).to_be_in_viewport()                          # the heads stay
            ink = lambda: page.locator('.vnb').first.evaluate('e => getComputedStyle(e).color')
            light = ink(); shot(page, 'page-large-light')
            page.emulate_media(color_scheme='dark'); assert ink() != light; shot(page, 'page-large-dark')

    def test_it_comes_back_when_the_service_does(self, toy, server):
        host, port, p = server(toy)
        with browsing() as page:
            page.goto(f'http://{host}:{port}/'); page.locator('button.cell').first.wait_for(); p.send_signal(signal.SIGINT); p.wait(10)
            expect(page.locator('.note')).to_contain_text('trying again', timeout=30_000)
            toy.done('plain', 1, 70.); server(toy, port=port)
            expect(page.get_by_role('button', name='plain, seed 1: done')).to_be_visible(timeout=20_000)
            expect(page.locator('.note')).to_be_hidden()

class TestLab:
    pytestmark = in_browser

    def test_it_lives(self, lab, tmp_path):         # noqa: F811
        t = Toy(tmp_path/'copy'); t.done('plain', 0, 70.5); t.failed('focal', 0); t.notebook('focal', 0, 'run.failed.ipynb')
        show = f"from vae_nb.studies.widget import show_matrix\nshow_matrix('toy', {str(t.file)!r}, {str(t.runs)!r})"
        wait = "from pathlib import Path\nimport time\nwhile not Path('go').exists(): time.sleep(.1)"
        write_notebook(tmp_path/'copy'/'matrix.ipynb', '# Matrix', show, wait)
        with browsing(height=1300) as page:
            page.goto(f'{lab}/lab/tree/matrix.ipynb?reset')
            page.get_by_text('| Idle').wait_for(timeout=60_000)                                         # before that, Run All is dropped
            for n in ('Run', 'Run All Cells'): page.get_by_role('menuitem', name=n, exact=True).click()
            cell = lambda c, s: page.get_by_role('button', name=f'{c}, seed {s}: ')
            expect(cell('focal', 0)).to_have_text('✗', timeout=60_000); a = t.store.claim(t.keys['plain', 1]); t.store.beat(a, .5)
            expect(cell('plain', 1)).to_have_class(re.compile('s-running'), timeout=30_000)       # while the kernel is busy
            prompt = page.locator('.jp-InputPrompt').last; expect(prompt).to_have_text('[*]:'); (tmp_path/'copy'/'go').touch()
            expect(prompt).to_have_text('[2]:', timeout=30_000)
            t.store.finish(a, 'done', 0, results=[dict(nelbo=70.1)]); expect(cell('plain', 1)).to_have_text('✓', timeout=30_000)
            cell('focal', 0).click(); panel = page.locator('.panel'); expect(panel.locator('pre')).to_contain_text('ValueError: no data')
            link = panel.get_by_role('link', name='Executed notebook')
            assert link.get_attribute('href') == f"/lab/tree/runs/toy/{t.keys['focal', 0]}/run.failed.ipynb"
            shot(page, 'lab'); cell('focal', 0).press('ArrowRight')
            expect(cell('focal', 1)).to_be_focused()                                                    # not JupyterLab's own key
            assert page.locator('.vnb-still').count() == 0 and not page.wrong, page.wrong
