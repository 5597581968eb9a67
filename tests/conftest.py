"Shared by the tests: a toy project in a temporary folder, and the command line as a user calls it."
import contextlib, io, os, subprocess, sys, time
from pathlib import Path
import pytest
from vae_nb.studies.runner import toy_experiment, toy_project, write_notebook

ROOT = Path(__file__).resolve().parents[1]

class Project:
    "A toy project: settings, experiments, and `vae-nb` run inside it."
    def __init__(self, root):
        self.root = toy_project(root); (self.root/'nbs').mkdir()

    def experiment(self, name, *cells, params='', profiles='  quick: {}\n', opened=True):
        "An experiment; with `opened=False` it only knows its folder, `path`, and starts quickly because torch is not imported."
        if opened: path = toy_experiment(self.root, *cells, name=name, params=params)
        else:
            head = f"profile: str = 'quick'\nseed: int = 0\n{params}"
            start = "import os, pathlib, signal, time\npath = pathlib.Path(os.environ['VAE_NB_RUN'])"
            path = write_notebook(self.root/'experiments'/f'{name}.ipynb', '# Toy', head, start, *cells)
        path.with_suffix('.yaml').write_text(f'profiles:\n{profiles}')

    def env(self):
        return {k: v for k, v in os.environ.items() if k != 'VAE_NB_RUN'} | dict(OMP_NUM_THREADS='1', NO_COLOR='1', COLUMNS='120')

    def start(self, *args, **kw):
        return subprocess.Popen([Path(sys.executable).with_name('vae-nb'), *map(str, args)], cwd=self.root, env=self.env(), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)

    def __call__(self, *args, timeout=120):
        "Run `vae-nb ARGS`; returns the finished process."
        p = self.start(*args); out, err = p.communicate(timeout=timeout)
        return subprocess.CompletedProcess(args, p.returncode, out, err)

    def runs(self, name): return sorted(p for p in (self.root/'runs'/name).glob('*') if p.is_dir())
    def run(self, name): (path,) = self.runs(name); return path

@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.delenv('VAE_NB_RUN', raising=False); monkeypatch.chdir(tmp_path)
    return Project(tmp_path)

@pytest.fixture
def cli(monkeypatch):
    "`vae-nb` in the real project, in this process: no second import of torch."
    from vae_nb.cli import main
    monkeypatch.chdir(ROOT); monkeypatch.setenv('COLUMNS', '120')
    def run(*args):
        out, err, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: main([str(a) for a in args])
            except SystemExit as e: code = e.code
        return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())
    return run

def kernels(path):
    "Processes of the run folder `path` that are alive: its kernel has the folder in its environment."
    found = []
    for p in os.listdir('/proc'):
        with contextlib.suppress(OSError, ValueError):
            if f'VAE_NB_RUN={path}'.encode() in open(f'/proc/{int(p)}/environ', 'rb').read().split(b'\0'): found.append(int(p))
    return found

def wait_for(condition, seconds=60, what='condition'):
    "Poll until `condition()` is true; returns its value."
    end = time.time() + seconds
    while time.time() < end:
        if (v := condition()): return v
        time.sleep(0.05)
    raise AssertionError(f'{what} did not come true in {seconds} s')

def one_sentence(result, code=2):
    "Assert that a command ended with `code` and one line on stderr, without a traceback; returns that line."
    assert result.returncode == code, result.stderr + result.stdout
    assert 'Traceback' not in result.stderr
    lines = [l for l in result.stderr.splitlines() if l.strip()]
    assert len(lines) == 1, result.stderr
    return lines[0]
