"The benchmarks start, refuse what cannot work, and measure both libraries by the same rule. What needs pythae skips without it."
import importlib.util, json, runpy, sys

import numpy as np, pytest, torch
from conftest import ROOT

from vae_nb.core import UserError
from vae_nb.data.images import load_images
from vae_nb.evaluation.bounds import iwae
from vae_nb.training.trainer import build_vae
from vae_nb.training.config import make_config

FOLDER = ROOT/'benchmarks'; SCRIPTS = sorted(FOLDER.rglob('*.py'), key=lambda p: p.name)
SCRIPTS = [p for p in SCRIPTS if '.venv' not in p.parts]
NEEDS_PYTHAE = ('pythae_peer',)


def load(name):
    "A script of benchmarks/peers as a module of its own."
    spec = importlib.util.spec_from_file_location(f'benchmarks_{name}', FOLDER/'peers'/f'{name}.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m); return m


def start(path, *args, monkeypatch):
    "Run a script in this process, without a second import of torch; returns its exit code."
    monkeypatch.setattr(sys, 'argv', [str(path), *map(str, args)]); monkeypatch.setenv('COLUMNS', '120')
    monkeypatch.syspath_prepend(str(path.parent))
    try: runpy.run_path(str(path), run_name='__main__')
    except SystemExit as e: return e.code
    return 0


@pytest.fixture
def environment(): return load('environment')

@pytest.fixture
def pythae(environment):
    try: environment.find_python()
    except UserError as e: pytest.skip(str(e))
    return environment


def test_there_are_benchmarks(): assert {p.stem for p in SCRIPTS} >= {'generate', 'train', 'compare', 'environment', 'pythae_peer'}


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: p.stem)
def test_compiles_and_imports_only_its_own_side(path):
    text = path.read_text(); compile(text, str(path), 'exec')
    imports = [l for l in text.splitlines() if l.startswith(('import ', 'from '))]
    other = 'vae_nb' if path.stem in NEEDS_PYTHAE else 'pythae'
    assert not [l for l in imports if l.split()[1].split('.')[0] == other]


@pytest.mark.parametrize('path', [p for p in SCRIPTS if p.stem not in NEEDS_PYTHAE], ids=lambda p: p.stem)
def test_help(path, monkeypatch, capsys):
    assert start(path, '--help', monkeypatch=monkeypatch) == 0
    assert path.stem in capsys.readouterr().out


@pytest.mark.parametrize('args, said', [
    (['--images', '--steps', '1000'], '50,000'), (['--steps', '0'], 'at least 1'), (['--device', 'cuda:7'], 'cuda:7')])
def test_train_refuses(args, said, monkeypatch, capsys):
    assert start(FOLDER/'train.py', *args, monkeypatch=monkeypatch) == 2
    assert said in capsys.readouterr().err


def test_missing_and_outdated_environment(environment, monkeypatch, tmp_path):
    monkeypatch.delenv('VAE_NB_PEER_PYTHON', raising=False); monkeypatch.setattr(environment, 'STAMP', tmp_path/'installed.json')
    with pytest.raises(UserError, match='make peers'): environment.find_python()
    (tmp_path/'installed.json').write_text(json.dumps(dict(requirements='of old')))
    with pytest.raises(UserError, match='run `make peers` again'): environment.find_python()
    monkeypatch.setenv('VAE_NB_PEER_PYTHON', 'no-such-python')
    with pytest.raises(UserError, match='no-such-python'): environment.find_python()


def test_a_peer_answers_line_by_line_and_its_failure_is_told(environment, monkeypatch, tmp_path):
    script = tmp_path/'peer.py'; monkeypatch.setattr(environment, 'SCRIPT', script)
    monkeypatch.setenv('VAE_NB_PEER_PYTHON', sys.executable)
    script.write_text("import json, os, sys\nprint(json.dumps(dict(gpu=os.environ.get('CUDA_VISIBLE_DEVICES'))), flush=True)\n"
                      "for line in sys.stdin:\n    n = json.loads(line)['n']\n    print(json.dumps(10//n), flush=True)\n")
    with environment.Peer(log=tmp_path/'log') as peer:
        assert peer.hello == dict(gpu='') and [peer.ask(n=n) for n in (1, 5)] == [10, 2]
        with pytest.raises(UserError, match='ZeroDivisionError'): peer.ask(n=0)
    assert peer.process.returncode == 1
    with environment.Peer(log=tmp_path/'log', device='cuda:3') as peer: assert peer.hello == dict(gpu='3')
    assert peer.process.returncode == 0


@pytest.mark.parametrize('model', ['vae', 'vamp'])
def test_pythae_weights_mean_the_same_here(pythae, model, tmp_path, monkeypatch):
    "pythae's own validation loss is our one-sample bound of its weights, under its prior."
    monkeypatch.setitem(sys.modules, 'environment', pythae); compare = load('compare')
    g = torch.Generator().manual_seed(0)
    x = torch.bernoulli(torch.rand(600, 1, 1, 28, generator=g).expand(-1, -1, 28, -1), generator=g).to(torch.uint8).numpy()
    np.savez(tmp_path/'arrays.npz', train=x[:400], val=x[400:])
    small = '--width 8 --depth 1 --hidden 32 --latent-dim 6 --components 20 --batch-size 100 --epochs 2 --samples 30 --threads 1'.split()
    with pythae.Peer('train', '--data', tmp_path/'arrays.npz', '--out', tmp_path/'r.npz', '--model', model, '--scratch', tmp_path,
                     *small, log=tmp_path/'log') as peer: record = peer.read()
    config = make_config(dict(data='fashion_mnist', binarise='dynamic', width=8, depth=1, hidden=32, latent_dim=6))
    vae = build_vae(config.model_dump(), dict(size=28, channels=1)).eval()
    with np.load(tmp_path/'r.npz') as f: found = {k: torch.from_numpy(f[k]) for k in f.files}
    part = lambda p: {k.removeprefix(p + '/'): v for k, v in found.items() if k.startswith(p + '/')}
    vae.load_state_dict(part('weights')); compare.check_network(vae, **part('check'), name=model)
    other = part('check') | dict(mu=part('check')['mu'] + 1)
    with pytest.raises(UserError, match='computes something else'): compare.check_network(vae, **other, name=model)
    prior = compare.priors_of(part('priors'), 6).get('vamp'); best = record['eval_losses'][record['best_epoch'] - 1]
    bound = iwae(vae, torch.from_numpy(x[400:]), K=1, log_prior=prior and prior.log_prob)
    assert abs(bound['nll'] - best) < 4*bound['nll_se'] and abs(bound['nll'] - best) < 0.01*best
    assert all(s.shape == (30, 1, 28, 28) and 0 <= s.min() and s.max() <= 1 for s in part('samples').values())
    assert set(part('samples')) == dict(vae={'normal', 'gmm'}, vamp={'vamp'})[model]


def test_training_speed_beside_pythae(pythae, monkeypatch, capsys):
    try: load_images('fashion_mnist', limit=1, download=False)
    except UserError as e: pytest.skip(str(e))
    args = '--images --device cpu --steps 2 --rounds 1 --width 8 --batch-size 20 --threads 1 --no-compile'.split()
    assert start(FOLDER/'train.py', *args, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out; rows = [l.split('|') for l in out.splitlines() if l.startswith('| 1 |')]
    assert len(rows) == 2 and all(float(r[6]) > 0 for r in rows) and 'parameters on both sides' in out
