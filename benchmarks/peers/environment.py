"""pythae's own environment, benchmarks/peers/.venv, and the processes that run in it.

    python benchmarks/peers/environment.py [--share-torch]      (or: make peers, make peers SHARE_TORCH=1)

The environment holds a torch of its own, the release the project uses (about 5 GB with the GPU libraries). With --share-torch a
.pth file makes the packages of the running environment visible there instead, after its own: 30 MB, and the very same torch on
both sides. Either way vae_nb is not importable there. Another Python that has pythae is used if VAE_NB_PEER_PYTHON names it.
"""
import argparse, contextlib, json, os, shutil, subprocess, sys, tempfile
from importlib import metadata, util
from pathlib import Path

from vae_nb.core import UserError, hash_text, read_json, write_json

HERE = Path(__file__).resolve().parent
ENV, REQUIREMENTS, SCRIPT = HERE/'.venv', HERE/'requirements.txt', HERE/'pythae_peer.py'
STAMP = ENV/'installed.json'


def make_environment(share_torch=False):
    "Make the environment anew, unless it is there and of this kind; returns its Python."
    wanted = dict(requirements=hash_text(REQUIREMENTS.read_text()), shares_torch=share_torch, torch=metadata.version('torch'))
    python = ENV/'bin'/'python'
    if STAMP.exists() and python.exists() and read_json(STAMP) == wanted: return python
    if ENV.exists(): shutil.rmtree(ENV)
    print(f"Making {ENV} for pythae{'' if share_torch else ', with its own torch (about 5 GB)'} ...", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, '-m', 'venv', ENV], check=True)
    lines = [l for l in REQUIREMENTS.read_text().splitlines() if l and not l.startswith('#')]
    peer, rest = lines[0], [l for l in lines[1:] if l != 'torch']
    if share_torch:
        site, = ENV.glob('lib/python*/site-packages')
        (site/'shared-torch.pth').write_text(f"{Path(util.find_spec('torch').origin).parents[1]}\n")
    else: rest.append('torch==' + wanted['torch'].split('+')[0])
    pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    try:
        subprocess.run([*pip, *rest], check=True)
        subprocess.run([*pip, '--no-deps', peer], check=True)
    except subprocess.CalledProcessError as e:
        raise UserError(f"pip could not install what {REQUIREMENTS} lists (it ended with {e.returncode}): is there a network?") from None
    write_json(STAMP, wanted)
    return python


def find_python():
    "The Python that has pythae. Raises `UserError` with the command that makes it."
    given = os.environ.get('VAE_NB_PEER_PYTHON')
    if given:
        if not shutil.which(given): raise UserError(f"VAE_NB_PEER_PYTHON is {given!r}, and there is no such program.")
        return given
    if not STAMP.exists():
        raise UserError("pythae runs in its own environment, which is not there yet: make it with `make peers` (about 5 GB), or with "
                        "`make peers SHARE_TORCH=1` (30 MB; it borrows the torch of .venv).")
    if read_json(STAMP)['requirements'] != hash_text(REQUIREMENTS.read_text()):
        raise UserError(f"The environment of pythae is older than {REQUIREMENTS.name}: run `make peers` again.")
    return ENV/'bin'/'python'


class Peer:
    "pythae_peer.py at work: `ask` sends one line of JSON and waits for one. What it says beside that goes to a log."
    def __init__(self, *args, device='cpu', log=None):
        visible = '' if str(device) == 'cpu' else str(device).partition(':')[2]
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH' or 'VAE_NB_PEER_PYTHON' in os.environ}
        if visible or str(device) == 'cpu': env['CUDA_VISIBLE_DEVICES'] = visible
        self.log = Path(log) if log else Path(tempfile.mkdtemp())/'pythae.log'
        with open(self.log, 'w') as f:
            self.process = subprocess.Popen([find_python(), SCRIPT, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=f, text=True, env=env)
        try: self.hello = self.read()
        except BaseException: self.close(); raise

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = [l for l in self.log.read_text().splitlines() if l.strip()]
            last = said[-1][:200] if said else 'it said nothing'
            raise UserError(f"pythae ended with {self.process.returncode} ({last}): see {self.log}.")
        return json.loads(line)

    def ask(self, **request):
        with contextlib.suppress(BrokenPipeError): self.process.stdin.write(json.dumps(request) + '\n'); self.process.stdin.flush()
        return self.read()

    def close(self):
        with contextlib.suppress(BrokenPipeError): self.process.stdin.close()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()
        self.process.stdout.close()

    def __enter__(self): return self
    def __exit__(self, *e): self.close()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--share-torch', action='store_true', help='see the packages of the running environment: no second torch')
    a = p.parse_args()
    try: python = make_environment(a.share_torch)
    except UserError as e: p.exit(2, f'{e}\n')
    print(python)


if __name__ == '__main__': main()
