"""Studies from the command line, and what must not hurt them: each test really kills, fills, edits or interrupts. Afterwards no result is
lost, nothing was done twice, no process is left, and the same command goes on."""
import contextlib, json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
from conftest import ROOT, kernels, wait_for

from vae_nb.studies.store import Store
from vae_nb.studies.worker import worker_argv

STUDY = """study: {name}
notebook: toy
configurations: {{plain: {{focal: false}}, focal: {{focal: true}}}}
seeds: {{phase1: {seeds}}}
resources: {{timeout: {timeout}}}
"""
TRACE = "from pathlib import Path\nimport os, time\nopen('trace.txt', 'a').write(f'{run.focal} {seed} {os.getpid()}\\n')"
WAIT = "while not Path('go').exists(): time.sleep(.05)"
FINISH = "open('ended.txt', 'a').write(f'{run.focal} {seed}\\n')\nrun.finish(nelbo=70. + seed - run.focal)"


class Toy:
    "A project with one study of two configurations."
    def __init__(self, project, *cells, seeds=1, timeout=60, name='toy'):
        self.project, self.root, self.name = project, project.root, name
        project.experiment('toy', TRACE, *cells, FINISH, params='focal: bool = False  # whether\n')
        (self.root/'study.yaml').write_text(STUDY.format(name=name, seeds=seeds, timeout=timeout))

    def __call__(self, *args, **kw): return self.project('study', 'study.yaml', *args, **kw)
    def start(self, *args): return self.project.start('study', 'study.yaml', *args, start_new_session=True)
    @property
    def store(self): return Store(self.root/'runs'/'studies.db')
    def rows(self): return self.store.runs(self.name)
    def states(self): return [r.state for r in self.rows()]
    def lines(self, name): p = self.root/name; return p.read_text().splitlines() if p.exists() else []

    def running(self, n=1):
        "Rows of which the notebook is at work; waits for `n` of them."
        def found():
            if not (self.root/'runs'/'studies.db').exists(): return
            rows = [r for r in self.rows() if r.state == 'running' and kernels(r.folder)]
            return rows if len(rows) >= n and len(self.lines('trace.txt')) >= n else None
        return wait_for(found, what=f'{n} running notebooks')

    def processes(self):
        "Whatever still works for this project: workers and kernels."
        mark, res = str(self.root).encode(), []
        for p in os.listdir('/proc'):
            with contextlib.suppress(OSError, ValueError):
                cmd = open(f'/proc/{int(p)}/cmdline', 'rb').read()
                if b'vae_nb.studies.worker' in cmd and mark in cmd: res.append(int(p))
        return res + [k for r in self.rows() for k in kernels(r.folder)]

    def check_whole(self, cells):
        "All done, each once, nothing left running."
        assert self.states() == ['done']*cells
        assert len(self.store.results(self.name)) == cells
        ended = self.lines('ended.txt'); assert len(ended) == len(set(ended)) == cells, ended
        for r in self.rows(): assert sum(a['outcome'] == 'done' for a in self.store.attempts(r.key)) == 1
        wait_for(lambda: not self.processes(), 30, 'an end of all processes')


def test_from_plan_to_status(project):
    t = Toy(project, seeds=3)
    p = t('plan'); assert p.returncode == 0 and 'To run 6' in p.stdout and not (t.root/'runs').exists(), p.stderr
    p = t('status'); assert p.returncode == 2 and 'Nothing of toy has been run yet' in p.stderr
    p = t('run', '--jobs', '2'); assert p.returncode == 0, p.stderr
    assert 'plain, seed 0: done' in p.stderr and '| plain | 3 |' in p.stdout and 'report' in p.stdout
    t.check_whole(6)
    data = {(r['configuration'], r['seed']): r['nelbo'] for r in t.store.results('toy')}
    assert data['plain', 2] == 72 and data['focal', 2] == 71
    for r in t.rows():          # the seed, all the way: row, parameters, run folder, the notebook's own word
        assert r.params['seed'] == r.seed == json.loads((r.folder/'metrics.json').read_text())['seed']
    before = t.store.version
    p = t('run')
    assert p.returncode == 0 and t.store.version == before and len(t.lines('trace.txt')) == 6     # again: nothing
    p = t('plan'); assert 'Nothing to run' in p.stdout and 'done 6' in p.stdout
    p = t('status'); assert p.returncode == 0 and p.stdout.count('✓') >= 6


@pytest.mark.parametrize('args, said', [
    (('study', 'nix.yaml', 'plan'), 'There is no study at nix.yaml'), (('study', 'study.yaml', 'rum'), "Did you mean 'run'"),
    (('study', 'study.yaml', 'run', '--phase', 'phase2'), "Phase 'phase2' is unknown"), (('study', 'study.yaml', 'run', '--on', 'moon'),
                                                                                         "'moon'"),
    (('study', 'study.yaml', 'run', '--jobs', '0'), '--jobs 0'), (('study', 'study.yaml', 'run', '--profile', 'big'), 'has no profiles'),
    (('study', 'study.yaml', 'report'), 'comes first'), (('study', 'study.yaml', 'fetch'), 'names no sweep')])
def test_mistakes_get_one_sentence_and_start_nothing(project, args, said):
    t = Toy(project); p = project(*args)
    assert p.returncode == 2 and said in p.stderr and len(p.stderr.strip().splitlines()) == 1, p.stderr
    assert not t.lines('trace.txt')


def test_cell_error_killed_kernel_timeout_and_another_seed_are_failures_with_reasons(project):
    t = Toy(project, "if seed == 0 and not run.focal: raise ValueError('no data')",
            "import signal\nif seed == 0 and run.focal: os.kill(os.getpid(), signal.SIGKILL)",
            "if seed == 1 and not run.focal: time.sleep(60)",
            "if seed == 1 and run.focal and not Path('mended').exists(): seed = 99", seeds=2, timeout=8)
    p = t('run'); assert p.returncode == 1
    why = {(r.configuration, r.seed): r.reason for r in t.rows()}; assert t.states() == ['failed']*4
    assert 'ValueError: no data' in why['plain', 0] and 'signal 9' in why['focal', 0]
    assert 'timeout' in why['plain', 1] and 'seed 99' in why['focal', 1]
    assert all(w in p.stdout for w in ('no data', 'signal 9', 'timeout', 'retry'))      # every failure is visible
    codes = {(r.configuration, r.seed): r.exit_code for r in t.rows()}; assert codes['plain', 1] == 124
    n = len(t.lines('trace.txt')); p = t('run')
    assert p.returncode == 1 and len(t.lines('trace.txt')) == n      # failures wait for a person
    (t.root/'mended').touch(); p = t('retry'); assert p.returncode == 0 and '4 jobs will be tried again' in p.stdout
    p = t('run'); assert [r.state for r in t.rows() if (r.configuration, r.seed) == ('focal', 1)] == ['done']
    wait_for(lambda: not t.processes(), 30, 'an end of all processes')


def test_killed_worker_is_done_again_at_once(project):
    t = Toy(project, WAIT)
    p = t.start('run', '--jobs', '2'); rows = t.running(2)
    for r in rows: os.kill(int(r.owner.rsplit(':', 1)[1]), signal.SIGKILL)
    (t.root/'go').touch()
    out, err = p.communicate(timeout=120); assert p.returncode == 0, err
    t.check_whole(2); assert [a['outcome'] for a in t.store.attempts(rows[0].key)] == ['lost', 'done']
    assert 'SIGKILL' in t.store.attempts(rows[0].key)[0]['reason']


def test_killed_scheduler_leaves_nothing_and_goes_on(project):
    t = Toy(project, "while seed == 1 and not Path('go').exists(): time.sleep(.05)", seeds=2)
    p = t.start('run', '--jobs', '2')
    wait_for(lambda: (t.root/'runs'/'studies.db').exists() and t.states()[:2] == ['done']*2, what='two done')
    t.running(1); p.send_signal(signal.SIGKILL); p.communicate()
    wait_for(lambda: not t.processes(), 20, 'an end of all processes')
    assert t.states()[:2] == ['done']*2 and set(t.states()[2:]) <= {'pending'}
    (t.root/'go').touch(); p = t('run'); assert p.returncode == 0, p.stderr
    t.check_whole(4)


def test_a_worker_stopped_at_any_moment_gives_its_job_back(project):
    t = Toy(project, seeds=2); assert t.start('run').wait(timeout=120) == 0        # four jobs, known to the store
    delays = (0., .01, .05, .15)
    for r, delay in zip(t.rows(), delays):
        for p in r.folder.iterdir(): p.unlink()                                    # to be done again
        with t.store.change() as c: c.execute("update attempts set outcome='lost' where key=?", (r.key,))
        p = subprocess.Popen(worker_argv(t.store.path, r.key), cwd=t.root, env=project.env() | dict(VAE_NB_SEED=str(r.seed)))
        wait_for(lambda key=r.key: len(t.store.attempts(key)) == 2, what='a claim')
        time.sleep(delay); p.send_signal(signal.SIGTERM)
        assert p.wait(timeout=60) == 130 and t.store.attempts(r.key)[-1]['outcome'] == 'cancelled', delay
    assert t.states() == ['pending']*4


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_stopped_by_a_signal(project, sig):
    t = Toy(project, WAIT)
    p = t.start('run', '--jobs', '2'); t.running(2); os.killpg(p.pid, sig)
    out, err = p.communicate(timeout=90); assert p.returncode == 130 and 'goes on' in err, err
    assert not t.processes() and t.states() == ['pending']*2
    (t.root/'go').touch(); p = t('run'); assert p.returncode == 0; t.check_whole(2)


def test_two_schedulers_do_everything_once(project):
    t = Toy(project, "time.sleep(.3)", seeds=3)
    both = [t.start('run', '--jobs', '2') for _ in range(2)]
    for p in both: out, err = p.communicate(timeout=120); assert p.returncode == 0, err
    t.check_whole(6); assert len(t.lines('trace.txt')) == 6


def test_edited_notebook_stops_the_study_and_an_undone_edit_goes_on(project):
    t = Toy(project, WAIT, seeds=3); nb = t.root/'experiments'/'toy.ipynb'; before = nb.read_text()
    p = t.start('run', '--jobs', '2'); t.running(2)
    nb.write_text(before.replace('70. + seed', '71. + seed')); (t.root/'go').touch()
    out, err = p.communicate(timeout=120); assert p.returncode == 2 and 'was edited' in err, err
    assert t.states().count('done') == 2, [r.reason for r in t.rows()]
    assert t.states().count('pending') == 4          # what ran was of the old version, and counts
    nb.write_text(before); p = t('run'); assert p.returncode == 0, p.stderr
    t.check_whole(6)


def test_only_an_edit_to_what_the_notebook_uses_makes_its_work_new(project):
    t = Toy(project); p = t('run'); assert p.returncode == 0, p.stderr
    package = t.root/'vae_nb'; package.unlink(); shutil.copytree(ROOT/'vae_nb', package, ignore=shutil.ignore_patterns('__pycache__'))
    for module, word in [('studies/dispatch.py', 'Nothing to run'), ('runs.py', 'To run 2')]:
        with open(package/module, 'a') as f: f.write('# edited\n')
        p = t('plan'); assert p.returncode == 0 and word in p.stdout, p.stdout + p.stderr


def test_full_disk_loses_nothing(project):
    "runs/ on a disk of its own that is full: the job fails with that word; with room again the study goes on."
    runs = project.root/'runs'; runs.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', runs]).returncode:
        pytest.skip('needs the right to mount')
    try:
        t = Toy(project, "if not Path('go').exists():\n    with open(run.path/'big', 'wb') as f:\n"
                         "        for _ in range(100): f.write(b'x'*100_000)")
        p = t('run', '--jobs', '1', timeout=300); assert p.returncode != 0
        said = p.stdout + p.stderr; assert 'No space left' in said or 'disk is full' in said or 'full' in said, said
        (t.root/'go').touch()
        for big in runs.glob('toy/*/big'): big.unlink()
        t('retry'); p = t('run'); assert p.returncode == 0, p.stderr
        t.check_whole(2); assert t.store.rows('pragma integrity_check') == [dict(integrity_check='ok')]
    finally: subprocess.run(['umount', '-l', runs])


def test_a_worker_that_cannot_even_start_does_not_go_round_for_ever(project, monkeypatch):
    t = Toy(project); bad = t.root/'bad'; bad.mkdir(); (bad/'sitecustomize.py').write_text(
        "import sys\nif any('vae_nb.studies.worker' in a for a in sys.orig_argv): sys.exit('no such library')\n")
    monkeypatch.setenv('PYTHONPATH', str(bad)); p = t('run'); assert p.returncode == 1, p.stderr
    assert t.states() == ['failed']*2 and 'lost 3 times' in t.rows()[0].reason and not t.lines('trace.txt')


def test_a_terminal_shows_a_live_table(project):
    import pty
    t = Toy(project, seeds=2); screen, theirs = pty.openpty()
    argv = [Path(sys.executable).with_name('vae-nb'), 'study', 'study.yaml', 'run']
    p = subprocess.Popen(argv, cwd=t.root, env=project.env() | dict(TERM='xterm'), stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    seen = b''
    with contextlib.suppress(OSError):                          # the terminal is gone when the program is
        while (piece := os.read(screen, 65536)): seen += piece
    assert p.wait(60) == 0; text = seen.decode(errors='replace')
    assert '▶ running' in text and '┃' in text and '| plain | ✓ | ✓ |' in text
    t.check_whole(4)


def test_cancel_and_give_back(project):
    t = Toy(project, WAIT)
    p = t.start('run', '--jobs', '2'); t.running(2); assert t('cancel').returncode == 0
    out, err = p.communicate(timeout=120); assert p.returncode == 1 and t.states() == ['cancelled']*2, err
    (t.root/'go').touch(); assert 'tried again' in t('retry').stdout; assert t('run').returncode == 0; t.check_whole(2)


def test_dependencies_hand_over_the_run_folder(project):
    project.experiment('toy', "import json\nfrom pathlib import Path\nbase = {}",
                       "if run.base: base = json.loads((Path(run.base)/'metrics.json').read_text())['metrics']",
                       "run.finish(nelbo=base.get('nelbo', 10.) + 1)",
                       params="base: str = ''  # run to start from\nsteps: int = 1  # steps\n")
    (project.root/'study.yaml').write_text("study: chain\nnotebook: toy\nconfigurations: {tuned: {steps: 2}, first: {steps: 1}}\n"
                                           "needs: {tuned: {base: first}}\nseeds: {phase1: 2}\n")
    p = project('study', 'study.yaml', 'run'); assert p.returncode == 0, p.stderr
    found = {(r['configuration'], r['seed']): r['nelbo'] for r in Store(project.root/'runs'/'studies.db').results('chain')}
    assert found == {('first', 0): 11, ('first', 1): 11, ('tuned', 0): 12, ('tuned', 1): 12}


def test_a_lost_terminal_line_is_no_lost_row(project):
    "Nobody reads the output: the study does not care."
    t = Toy(project)
    p = subprocess.Popen([Path(sys.executable).with_name('vae-nb'), 'study', 'study.yaml', 'run'], cwd=t.root, env=project.env(),
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    p.stdout.close(); p.wait(60); t.check_whole(2)


def test_report_in_files_and_mirrored_offline(project, monkeypatch):
    "The report of somebody's own study: summary, tables, figures; and the same at W&B without an account."
    pytest.importorskip('wandb'); t = Toy(project, seeds=2); assert t('run').returncode == 0
    (t.root/'experiments'/'validation.ipynb').write_text((ROOT/'experiments'/'validation.ipynb').read_text())
    monkeypatch.setenv('WANDB_MODE', 'offline'); p = t('report', '--wandb', 'studies', timeout=240); assert p.returncode == 0, p.stderr
    folder = t.root/p.stdout.strip(); made = {f.name for f in folder.rglob('*') if f.is_file()}
    assert made >= {'summary.md', 'results.csv', 'results.json', 'strips.png', 'heatmap.png', 'ranks.png', 'run.ipynb', 'metrics.json'}
    found = json.loads((folder/'results.json').read_text())
    assert found['values']['plain'] == {'0': 70, '1': 71} and '2 seeds' in found['worth']
    assert len((folder/'results.csv').read_text().splitlines()) == 5 and 'Study toy' in (folder/'summary.md').read_text()
    html = (folder/'run.ipynb').read_text(); assert html.count('text/html') and '<svg' in html               # the matrix as a still
    assert list((t.root/'runs'/'wandb').rglob('*.wandb')) and list((t.root/'runs'/'wandb').rglob('seeds*.table.json'))
    (t.root/'other.yaml').write_text((t.root/'study.yaml').read_text()); p = project('study', 'other.yaml', 'status')
    assert p.returncode == 2 and 'called toy too' in p.stderr


SCRIPT = ROOT/'scripts'/'launch_validation.sh'

def launch(*args, script=SCRIPT, cwd=ROOT, **env):
    vae_nb = str(Path(sys.executable).with_name('vae-nb'))
    return subprocess.run([script, *args], cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ | dict(VAE_NB=vae_nb) | env)


@pytest.mark.slow
@pytest.mark.parametrize('dice', [0, 1, 2])
def test_a_study_that_is_hurt_at_random_for_a_minute_ends_whole(project, dice):
    t = Toy(project, "time.sleep(1.5)", seeds=5); dice = random.Random(dice); said = []
    with open(t.root/'study.yaml', 'a') as f: f.write('engines: {local: {lease: 5}}\n')
    is_worker = lambda p: b'studies.worker' in Path(f'/proc/{p}/cmdline').read_bytes()
    p, end = t.start('run', '--jobs', '2'), time.time() + 60
    while time.time() < end:
        time.sleep(dice.uniform(.3, 2.5))
        if p.poll() is not None:
            _, err = p.communicate(); assert p.returncode in (0, 1, 130, -2, -9, -15), (said, err)       # -2, -15: before it could listen
            assert 'Traceback' not in err or 'KeyboardInterrupt' in err, (said, err)
            if p.returncode == 1: t('retry')                  # a dead kernel is a failure, and waits for a person
            p = t.start('run', '--jobs', '2')
        victim, sign = dice.choice([('scheduler', s) for s in ('KILL', 'TERM', 'INT')] + 3*[('worker', s) for s in ('KILL', 'TERM', 'STOP')]
                                   + 2*[('kernel', 'KILL')])
        with contextlib.suppress(OSError, IndexError):       # there may be none, or it has just ended
            found = [p.pid] if victim == 'scheduler' else [q for q in t.processes() if is_worker(q) == (victim == 'worker')]
            q = dice.choice(found); os.kill(q, signal.Signals[f'SIG{sign}']); said.append(f'{victim} {sign}')
            if sign == 'STOP': time.sleep(dice.uniform(0, 8)); os.kill(q, signal.SIGCONT)       # past its lease, sometimes
    p.send_signal(signal.SIGINT); p.communicate(timeout=60)
    for _ in range(5):
        if t('run', '--jobs', '2').returncode == 0: break
        t('retry')
    assert t.states() == ['done']*10 and len(t.store.results(t.name)) == 10 and len(said) > 10, said
    for r in t.rows():
        tries = t.store.attempts(r.key); assert all(a['ended'] for a in tries) and sum(a['outcome'] == 'done' for a in tries) == 1, said
    wait_for(lambda: not t.processes(), 30, 'an end of all processes')
    assert t.store.rows('pragma integrity_check')[0]['integrity_check'] == 'ok'


@pytest.mark.parametrize('args, said', [
    (['--jobs', '0'], '--jobs 0'), (['--jobs'], '--jobs needs a value'), (['--on', 'moon'], '--on moon'),
    (['--profil', 'x'], '--profil is unknown'),
    (['nix.yaml'], 'no study at nix.yaml'), (['--serve', '99999'], 'no port'), (['--profile', 'big', '--dry-run'], "'big' is unknown"),
    (['a.yaml', 'b.yaml'], 'second one')])
def test_launch_script_refuses(args, said):
    p = launch(*args); assert p.returncode == 2 and said in p.stderr and len(p.stderr.strip().splitlines()) == 1, p.stderr


def test_launch_script_dry_and_real(project):
    p = launch('--dry-run', '--profile', 'tiny', '--jobs', '2', '--serve'); assert p.returncode == 0, p.stderr
    assert 'To run' in p.stdout or 'Nothing to run' in p.stdout
    assert 'study experiments/validation.yaml run --profile tiny --jobs 2' in p.stdout and 'serve --port 8321' in p.stdout
    t = Toy(project); (t.root/'scripts').mkdir(); own = t.root/'scripts'/SCRIPT.name; own.write_text(SCRIPT.read_text()); own.chmod(0o755)
    p = launch('study.yaml', '--dry-run', script=own, cwd=t.root); assert p.returncode == 0 and not (t.root/'runs').exists(), p.stderr
    p = launch('study.yaml', '--no-report', script=own, cwd=t.root); assert p.returncode == 0, p.stderr
    t.check_whole(2)


def test_the_workflow_runs_the_smoke_study():
    import yaml
    from vae_nb.studies.spec import jobs_of, load_spec
    flow = yaml.safe_load((ROOT/'.github'/'workflows'/'validation.yml').read_text()); steps = flow['jobs']['study']['steps']
    text = '\n'.join(s.get('run', '') for s in steps); assert 'scripts/launch_validation.sh' in text and 'GITHUB_STEP_SUMMARY' in text
    assert any('upload-artifact' in s.get('uses', '') for s in steps)
    spec = load_spec(ROOT/'experiments'/'validation.yaml', 'tiny'); jobs = jobs_of(spec)
    assert len({j.configuration for j in jobs}) == 2 and len({j.seed for j in jobs}) == 3
    for s in steps:                                          # what the shell would run is at least a program
        if 'run' in s: assert subprocess.run(['bash', '-n', '-c', s['run']]).returncode == 0
