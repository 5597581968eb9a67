"Every experiment, at toy size, the three ways people run it; the book as a whole."
import os, subprocess, sys
from pathlib import Path

import nbformat, pytest

from vae_nb.core import load_settings, read_json
from vae_nb.runs import load_profiles, notebook_parameters

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT/'experiments').glob('*.ipynb'))
ENV = {k: v for k, v in os.environ.items() if k != 'VAE_NB_RUN'} | dict(OMP_NUM_THREADS='1')


def toy_root(tmp_path):
    "A project folder that borrows the experiments and the package, and keeps its own runs and report."
    for name in ('settings.ini', 'experiments', 'vae_nb', 'nbs'): (tmp_path/name).symlink_to(ROOT/name)
    return tmp_path


@pytest.mark.parametrize('nb', EXPERIMENTS, ids=lambda p: p.stem)
def test_profiles_set_what_the_notebook_leaves_open(nb):
    declared, profiles = notebook_parameters(nb), load_profiles(nb)
    assert {'tiny', 'quick', 'full'} <= set(profiles)
    open_ones = {n for n, p in declared.items() if p['default'] is None}
    for name, values in profiles.items(): assert open_ones <= set(values) <= set(declared), name
    assert all(p['help'] for p in declared.values())


@pytest.mark.parametrize('nb', EXPERIMENTS, ids=lambda p: p.stem)
def test_vae_nb_run_promote_report(nb, tmp_path):
    "The whole way: run, promote, render."
    root = toy_root(tmp_path); tool = lambda *a: subprocess.run([Path(sys.executable).with_name('vae-nb'), *a], cwd=root, env=ENV, capture_output=True, text=True, timeout=600)
    p = tool('run', f'experiments/{nb.name}', '--profile', 'tiny'); assert p.returncode == 0, p.stderr
    (run,) = (root/'runs'/nb.stem).iterdir()
    rec = read_json(run/'metrics.json'); prov = read_json(run/'provenance.json')
    assert rec['seed'] == prov['seed'] == load_settings().seed and prov['seconds'] > 0 and rec['figures'] and rec['tables']
    for name in rec['figures']: assert (run/'figures'/f'{name}.png').stat().st_size > 1000
    p = tool('run', f'experiments/{nb.name}', '--profile', 'tiny'); assert p.returncode == 0        # the same work is not done twice
    assert read_json(run/'provenance.json') == prov
    p = tool('promote', str(run)); assert p.returncode == 0, p.stderr
    p = tool('report'); assert p.returncode == 0, p.stderr
    page = (root/'README.md').read_text()
    assert '{{' not in page and (root/'report'/'report.html').stat().st_size > 10_000
    assert str(ROOT) not in page and str(tmp_path) not in page


@pytest.mark.parametrize('nb', EXPERIMENTS, ids=lambda p: p.stem)
def test_plain_papermill(nb, tmp_path):
    "papermill alone: the notebook opens its own run folder and reaches the same numbers."
    root = toy_root(tmp_path)
    p = subprocess.run([sys.executable, '-m', 'papermill', f'experiments/{nb.name}', str(tmp_path/'out.ipynb'), '-p', 'profile', 'tiny', '-k', 'python3', '--no-progress-bar'],
                       cwd=root, env=ENV, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr
    (run,) = (root/'runs'/nb.stem).iterdir()
    assert read_json(run/'metrics.json')['profile'] == 'tiny'
    out = nbformat.read(tmp_path/'out.ipynb', 4)
    assert not [o for c in out.cells for o in c.get('outputs', []) if o.output_type == 'error']


def test_capacity_at_toy_size_says_that_it_shows_nothing(tmp_path):
    "The verdict is computed: two epochs on 1,600 grids must not be called a success."
    root = toy_root(tmp_path); nb = ROOT/'experiments'/'capacity.ipynb'
    p = subprocess.run([Path(sys.executable).with_name('vae-nb'), 'run', str(nb), '--profile', 'tiny', '--seed', '7'], cwd=root, env=ENV, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr
    (run,) = (root/'runs'/'capacity').iterdir(); m = read_json(run/'metrics.json')['metrics']
    assert read_json(run/'metrics.json')['seed'] == 7 and m['verdict'].startswith('Not shown at this budget')
    assert m['nelbo'] == pytest.approx(m['nll'] + m['kl']) and m['beta1_nelbo'] > m['source_entropy'] and m['implied_beta'] == 25.6
