"The command line as a user meets it: help that reads, and one sentence for each mistake."
import subprocess, sys
import pytest
from conftest import one_sentence
from vae_nb.cli import _order

def test_top_help_is_quick_to_the_point_and_free_of_torch(cli):
    r = cli('--help'); assert r.returncode == 0 and all(f'  {n} ' in r.stdout for n in _order)
    assert '...' not in r.stdout.split('Commands:')[1].split('Examples')[0]         # no line is cut short
    assert cli('--version').stdout.startswith('vae-nb ') and cli().stdout.strip() == r.stdout.strip()
    code = """import sys, vae_nb.cli as c
try: c.main(['--help'])
except SystemExit: pass
assert not {'torch', 'papermill', 'pydantic'} & set(sys.modules)"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0

@pytest.mark.parametrize('name', _order)
def test_help_of_each_command(cli, name):
    r = cli(name, '--help')
    assert r.returncode == 0 and r.stdout.startswith(f'Usage: vae-nb {name}'), r.stderr
    assert f'    vae-nb {name}' in r.stdout                                         # with an example
    assert all(len(l) <= 120 for l in r.stdout.splitlines())

@pytest.mark.parametrize('args, said', [
    ('trian', "Did you mean 'train'"),
    ('run', 'notebook'), ('run capacity --profil tiny', '--profile'), ('run a b', 'b'), ('run capacity -p beta', 'lacks a value'),
    ('run capacity --seed x', "seed is 'x' in the options: it must be a whole number."),
    ('run no_such_thing', 'no_such_thing'),
    ('promote no/such/run', 'no/such/run'), ('promote nbs', 'not a run folder'), ('report --strikt', '--strict'),
    ('train --beta-schedule cosinus', 'cosine'), ('train --beta-mux 1', '--beta-max'),
    ('train --epochs many', "epochs is 'many' in the options: it must be a whole number of at least 1."),
    ('train --lr abc', "lr is 'abc' in the options: it must be a number above 0."), ('train --width 6', 'and a multiple of 4.'),
    ('train --beta-max -1', 'beta_max is -1.0 in the options: it must be a number of at least 0.'),
    ('train --data images', 'In the options, data images needs data_path'),
    ('train --config no.yaml', 'no.yaml'), ('train --data-path no.npz', 'no.npz'),
    ('generate', '--out'),
    ('generate --out no/x.npz --samples 0', 'samples'),
    ('generate --out no/x.npz --recipe simplifed', 'simplified'), ('evaluate no/such/run', 'no/such/run')])
def test_mistakes_get_one_sentence(cli, args, said):
    assert said in one_sentence(cli(*args.split()))

def test_train_options_are_the_fields(cli):
    from vae_nb.training.config import TrainConfig
    out = cli('train', '--help').stdout
    for name, field in TrainConfig.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        assert f'{flag} ' in out and (field.annotation is not bool or f"--no-{name.replace('_', '-')}" in out)

def test_help_names_other_defaults_for_images_and_all_pages_of_the_report(cli):
    from vae_nb.training.config import image_defaults
    out = ' '.join(cli('train', '--help').stdout.split())
    for name, v in image_defaults.items():
        assert f"; for images: {v if v != '' else 'none'}]" in out.split(f"--{name.replace('_', '-')} ")[1]
    out = ' '.join(cli('report', '--help').stdout.split())
    assert all(f in out for f in ('README.md', 'report/report.html', 'report/report.pdf', 'nbs/page_NAME.ipynb', 'report/NAME.pdf'))

def test_a_refused_training_does_not_say_where_it_trains(cli, tmp_path):
    r = cli('train', '--data-path', 'no.npz', '--device', 'cuda:99', '--out', tmp_path/'r')
    assert 'cuda:99' in one_sentence(r) and r.stdout == '' and not (tmp_path/'r').exists()

def test_config_file_is_read_and_options_are_stronger(cli, tmp_path, monkeypatch):
    import vae_nb.train as t
    (tmp_path/'c.yaml').write_text('beta_max: 0.5\nlatent_dim: 16\n'); seen = {}
    monkeypatch.setattr(t, 'train', lambda config, out=None, **kw: seen.update(config=config, out=out))
    r = cli('train', '--config', tmp_path/'c.yaml', '--beta-max', '0.1', '--compile', '--out', tmp_path/'r'); c = seen['config']
    assert r.returncode == 0 and (c.beta_max, c.latent_dim, c.compile) == (0.1, 16, True) and seen['out'] == tmp_path/'r'
    (tmp_path/'c.yaml').write_text('beta_mux: 0.5\n')
    assert "Did you mean 'beta_max'" in one_sentence(cli('train', '--config', tmp_path/'c.yaml'))

@pytest.mark.parametrize('words, said', [((), 'Stopped.'), (('Stopped at step 7.',), 'Stopped at step 7.')])
def test_interrupt_is_no_traceback(cli, monkeypatch, words, said):
    import vae_nb.train as t
    def stop(*a, **k): raise KeyboardInterrupt(*words)
    monkeypatch.setattr(t, 'train', stop)
    assert one_sentence(cli('train'), 130) == said
