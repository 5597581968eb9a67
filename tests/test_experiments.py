"Every experiment, at toy size, the three ways people run it; the book as a whole."
import os, subprocess, sys
from pathlib import Path

import nbformat, pytest

from vae_nb.core import load_settings, read_json
from vae_nb.runs import load_profiles, notebook_parameters

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT/'experiments').glob('*.ipynb'))
NEEDS_PICTURES, PICTURES = ('fashion_mnist', 'stability', 'doctor'), load_settings().data/'FashionMNIST'/'raw'
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


def tool(root, *args):
    return subprocess.run([Path(sys.executable).with_name('vae-nb'), *args], cwd=root, env=ENV, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope='module', params=EXPERIMENTS, ids=lambda p: p.stem)
def ran(request, tmp_path_factory):
    "An experiment run by `vae-nb run` at toy size with seed 7: its notebook, the project folder and the run folder."
    if request.param.stem in NEEDS_PICTURES and not PICTURES.exists():
        pytest.skip(f'{request.param.stem} needs Fashion-MNIST in the data folder (VAE_NB_DATA), and downloads are not for tests')
    root = toy_root(tmp_path_factory.mktemp('project')); nb = request.param
    p = tool(root, 'run', f'experiments/{nb.name}', '--profile', 'tiny', '--seed', '7'); assert p.returncode == 0, p.stderr
    (run,) = (root/'runs'/nb.stem).iterdir()
    return nb, root, run


def test_run_folder_is_whole(ran):
    nb, root, run = ran; rec, prov = read_json(run/'metrics.json'), read_json(run/'provenance.json')
    assert rec['seed'] == prov['seed'] == 7 and rec['profile'] == 'tiny' and prov['seconds'] > 0 and rec['figures'] and rec['tables']
    for name in rec['figures']: assert (run/'figures'/f'{name}.png').stat().st_size > 1000


def test_promote_and_report(ran):
    nb, root, run = ran
    p = tool(root, 'promote', str(run)); assert p.returncode == 0, p.stderr
    p = tool(root, 'report'); assert p.returncode == 0, p.stderr
    page = (root/'README.md').read_text()
    assert '{{' not in page and (root/'report'/'report.html').stat().st_size > 10_000
    assert str(ROOT) not in page and str(root) not in page


def test_the_same_work_is_not_done_twice(ran):
    nb, root, run = ran; prov = read_json(run/'provenance.json')
    p = tool(root, 'run', f'experiments/{nb.name}', '--profile', 'tiny', '--seed', '7'); assert p.returncode == 0, p.stderr
    assert read_json(run/'provenance.json') == prov


def test_plain_papermill_reaches_the_same_numbers(ran, tmp_path):
    "papermill alone: the notebook opens its own run folder, and the seed decides every number but the times."
    nb, _, run = ran; root = toy_root(tmp_path)
    p = subprocess.run([sys.executable, '-m', 'papermill', f'experiments/{nb.name}', str(tmp_path/'out.ipynb'), '-p', 'profile', 'tiny',
                        '-p', 'seed', '7', '-k', 'python3', '--no-progress-bar'],
                       cwd=root, env=ENV, capture_output=True, text=True, timeout=900)
    assert p.returncode == 0, p.stderr
    (own,) = (root/'runs'/nb.stem).iterdir(); strip = lambda m: {k: v for k, v in m['metrics'].items() if 'seconds' not in k}
    assert own.name == run.name and strip(read_json(own/'metrics.json')) == strip(read_json(run/'metrics.json'))
    assert not [o for c in nbformat.read(tmp_path/'out.ipynb', 4).cells for o in c.get('outputs', []) if o.output_type == 'error']


def test_capacity_at_toy_size_says_that_it_shows_nothing(ran):
    "The verdict is computed: two epochs on 1,600 grids must not be called a success."
    nb, root, run = ran
    if nb.stem != 'capacity': pytest.skip('about the capacity experiment')
    m = read_json(run/'metrics.json')['metrics']
    assert m['verdict'].startswith('Not shown at this budget') and m['targets_reached'] is None and m['implied_beta'] == 25.6
    assert m['nelbo'] == pytest.approx(m['nll'] + m['kl']) and m['beta1_nelbo'] > m['source_entropy']
