"The doctor as a program: sound and broken runs, a VAE from elsewhere, exit codes."
import json, shutil, subprocess, sys
from pathlib import Path

import pytest

from vae_nb.data.datasets import make_dataset, save_dataset
from vae_nb.debugging.diagnoses import DIAGNOSES, FOLLOWS, ROOTS, diagnose
from vae_nb.debugging.findings import THRESHOLDS
from vae_nb.runs import read_events
from vae_nb.training.trainer import fit

SMALL = dict(width=8, depth=0, latent_dim=16, epochs=2, batch_size=64, lr=5e-3, focal_gamma=0, class_weights='none', device='cpu')
PLAIN = '''
"A VAE in plain PyTorch, without a line of vae_nb."
import torch
from torch import nn
torch.manual_seed(0)
bars = torch.zeros(1500, 1, 8, 8)
for b, i, k in zip(bars, torch.randint(8, (1500,)), torch.randint(8, (1500,))): b[:, i] = 1; b[:, :, k] = 1
data = bars.to(torch.uint8); train, x = data[:1000], data[1000:]
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))
        self.dec = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)))
model = Net(); opt = torch.optim.Adam(model.parameters(), 5e-3)
def encode(x): return (h := model.enc(x.float()))[:, :6], h[:, 6:].clamp(-8, 4)
def decode(z): return model.dec(DECODED)
for step in range(600):
    b = train[torch.randint(1000, (100,))]; mu, logvar = encode(b); z = mu + (logvar/2).exp()*torch.randn_like(mu)
    nll = nn.functional.binary_cross_entropy_with_logits(decode(z), b.float(), reduction='sum')/100
    loss = nll + 0.5*(mu**2 + logvar.exp() - 1 - logvar).sum()/100
    opt.zero_grad(); loss.backward(); opt.step()
'''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    d = tmp_path_factory.mktemp('doctor'); save_dataset(d/'grids.npz', make_dataset('simplified', 2000, seed=3))
    fit(SMALL | dict(data_path=str(d/'grids.npz'), reduction='mean_sum', beta_schedule='constant'), d/'run', progress='none')
    return d/'run'


def test_a_vae_in_plain_pytorch(tmp_path):
    found = {}
    for name, decoded in dict(sound='z', deaf='0*z').items():
        (tmp_path/f'{name}.py').write_text(PLAIN.replace('DECODED', decoded))
        r = diagnose(tmp_path/f'{name}.py', examples=400); found[name] = [f.name for f in r.findings]
        assert 'metric_bug' in r.skipped and 'mode_bug' in r.checked      # there is no log, but there is a model
    assert found['deaf'][0] == 'dead_decoder' and 'posterior_collapse' in found['deaf']
    assert not {'dead_decoder', 'posterior_collapse', 'latent_bypass', 'mode_bug', 'wrong_range'} & set(found['sound'])


def test_the_command_prints_writes_and_ends_with_the_code(run, cli, tmp_path):
    p = cli('diagnose', run, '--device', 'cpu', '--examples', 100, '--out', tmp_path/'page')
    assert p.returncode == 3 and '# Diagnosis of run' in p.stdout and '**Remedy:** `reduction: sum`' in p.stdout
    saved = json.loads((tmp_path/'page'/'diagnosis.json').read_text())
    assert saved['findings'][0]['name'] == 'implicit_beta' and (tmp_path/'page'/'figures'/'implicit_beta.png').exists()
    p = cli('diagnose', run, '--device', 'cpu', '--examples', 100, '--out', tmp_path/'page', '--as-json')
    assert p.returncode == 3 and json.loads(p.stdout)['checked'] == saved['checked']


def test_what_cannot_be_looked_at_is_said(run, cli, tmp_path):
    p = cli('diagnose', tmp_path/'none'); assert p.returncode == 2 and 'no training run' in p.stderr
    (tmp_path/'broken.py').write_text('raise ValueError("oh")')
    p = cli('diagnose', tmp_path/'broken.py'); assert p.returncode == 2 and 'cannot be imported (ValueError: oh)' in p.stderr
    early = tmp_path/'early'; shutil.copytree(run, early); shutil.rmtree(early/'checkpoint'); (early/'metrics.json').unlink()
    r = diagnose(early, device='cpu', examples=100)              # killed before its first checkpoint: the log still speaks
    assert [f.name for f in r.findings] == ['implicit_beta'] and r.skipped['posterior_collapse'] == 'there is no trained network'
    (early/'events.jsonl').unlink(); r = diagnose(early, device='cpu'); assert not r.checked and r.exit_code == 2


def test_the_tables_fit_together():
    from vae_nb.debugging.faults import FAULTS, diagnoses
    assert set(DIAGNOSES) == set(diagnoses) == {f.diagnosis for f in FAULTS.values()} and len(DIAGNOSES) == 23
    assert set(FOLLOWS) | set(ROOTS) <= set(DIAGNOSES)
    assert all(c in DIAGNOSES for table in (FOLLOWS, ROOTS) for causes in table.values() for c in causes)
    assert all(t.why and t.unit is not None for t in THRESHOLDS.values())
    def causes(name, seen=()):
        assert name not in seen, f'a circle: {seen + (name,)}'
        for c in FOLLOWS.get(name, ()): causes(c, seen + (name,))
    for name in FOLLOWS: causes(name)


def test_the_doctor_does_not_know_the_faults():
    "It must judge by what a user's own run has: no diagnosis and no probe imports the planted faults."
    code = "import sys, vae_nb.diagnose; sys.exit(any('debugging.faults' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_a_fault_under_a_neutral_name_is_named_by_its_folder_alone(tmp_path):
    "The folder tells nothing of what was planted, in its name or in any file, and a process that never saw the fault names it."
    from vae_nb.debugging.faults import FAULTS, diagnoses
    from vae_nb.debugging.scorecard import Case, run_cases
    case = Case('grids', 'hidden_average', 'strong', 5); short = dict(epochs=2, train_limit=600, val_limit=200)
    run_cases([case], tmp_path, 1, short, 100, None); folder = tmp_path/case.label
    words = [w.encode() for w in (*FAULTS, *diagnoses)]
    for p in (p for p in folder.rglob('*') if p.is_file() and p.name != 'latest.json'):       # it remembers what was warned of
        text = b''.join(l for l in p.read_bytes().splitlines(True) if b'"kind": "warning"' not in l)
        assert not any(w in p.name.encode() or w in text for w in words), p
    moved = tmp_path/'somebody'/'run_17'; moved.parent.mkdir(); folder.rename(moved)
    code = f"from vae_nb.diagnose import diagnose; import sys; r = diagnose({str(moved)!r}, device='cpu', examples=100); " \
           "assert r.findings[0].name == 'implicit_beta'; assert not any('debugging.faults' in m for m in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).returncode == 0


def test_mend_changes_the_configuration_trains_again_and_compares(run, cli, tmp_path):
    ill = tmp_path/'ill'; shutil.copytree(run, ill)
    p = cli('diagnose', ill, '--device', 'cpu', '--examples', 100, '--mend'); assert p.returncode == 3, p.stderr
    assert '## Mended: implicit beta' in p.stdout and '+ reduction: sum' in p.stdout and 'The finding is **gone**' in p.stdout
    m = json.loads((ill/'mended'/'mend.json').read_text()); before, after = (json.loads((d/'config.json').read_text())
                                                                             for d in (ill, ill/'mended'))
    assert m['difference'] < 0 and m['gone'] and (ill/'mended'/'mend.png').stat().st_size > 1000
    assert {k for k in before['params'] if before['params'][k] != after['params'][k]} == {'reduction'} and before['seed'] == after['seed']
    p = cli('diagnose', ill, '--device', 'cpu', '--examples', 100, '--mend', '--as-json')          # a second time: found trained
    assert json.loads(p.stdout)['mended']['difference'] == m['difference']


def test_what_cannot_be_mended_is_said(run, cli, tmp_path):
    (tmp_path/'theirs.py').write_text(PLAIN.replace('DECODED', 'z'))
    p = cli('diagnose', tmp_path/'theirs.py', '--mend'); assert p.returncode == 2 and 'no configuration' in p.stderr
    lying = tmp_path/'lying'; shutil.copytree(run, lying); m = json.loads((lying/'metrics.json').read_text())
    c = json.loads((lying/'config.json').read_text()); c['params'] |= dict(reduction='sum', beta_max=0.)
    (lying/'config.json').write_text(json.dumps(c)); (lying/'events.jsonl').unlink()
    m['metrics'] |= dict(nelbo=1., nll=1., kl=0.); (lying/'metrics.json').write_text(json.dumps(m))    # says other than the weights
    r = diagnose(lying, device='cpu', examples=100); assert 'metric_bug' in [f.name for f in r.findings]
    r.findings = [f for f in r.findings if f.name == 'metric_bug']
    from vae_nb.core import UserError
    from vae_nb.debugging.remedies import mend
    with pytest.raises(UserError, match='No configuration can mend metric bug'): mend(lying, device='cpu', examples=100, report=r)
    assert not (lying/'mended').exists()


def test_what_is_not_a_number_is_no_health(tmp_path):
    (tmp_path/'nan.py').write_text(PLAIN.replace('DECODED', 'z').replace('h[:, 6:].clamp(-8, 4)', 'h[:, 6:]*float("nan")')
                                   .replace('range(600)', 'range(1)'))
    r = diagnose(tmp_path/'nan.py', examples=200); assert 'logvar_overflow' in [f.name for f in r.findings] and r.exit_code == 3


@pytest.mark.parametrize('stop', ['', 'collapse'])
def test_a_running_training_warns_once_and_stops_if_told(run, cli, tmp_path, stop):
    path = json.loads((run/'config.json').read_text())['params']['data_path']
    args = '--width 8 --depth 0 --latent-dim 16 --epochs 30 --batch-size 64 --lr 0.005 --focal-gamma 0 --class-weights none --device cpu'
    more = ['--reduction', 'mean_mean', '--beta-schedule', 'constant', '--beta-max', '20']
    p = cli('train', '--data-path', path, *args.split(), *more, '--out', tmp_path/'run', *(['--stop-on', stop] if stop else []))
    assert p.returncode == 0, p.stderr
    warned = read_events(tmp_path/'run'/'events.jsonl', 'warning'); names = [w['finding'] for w in warned]
    assert names.count('posterior_collapse') == 1 and len(names) == len(set(names))
    m = json.loads((tmp_path/'run'/'metrics.json').read_text())['metrics']
    assert (m['status'], m['steps'] < 750) == (('posterior_collapse', True) if stop else ('epochs', False))
    assert (p.stdout + p.stderr).count('posterior_collapse: the rate is') == 1


def test_a_misspelt_warning_is_one_sentence(run, cli, tmp_path):
    p = cli('train', '--stop-on', 'colapse', '--out', tmp_path/'run'); assert p.returncode == 2
    assert "Did you mean 'collapse'?" in p.stderr and not Path(tmp_path/'run').exists()
