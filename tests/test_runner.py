"What a lesson cannot show: runs that are killed, stopped, raced for and repeated."
import json, signal
import pytest
from conftest import kernels, one_sentence, wait_for
from vae_nb.core import UserError
from vae_nb.studies.runner import RunFailed, run_notebook, run_status

FINISH = 'run.finish(nats=1.5)'
METRICS = "(path/'metrics.json').write_text('{}')"      # what `run.finish` leaves behind
SLEEP = "(path/'here').touch(); time.sleep(300)"

def failure(path): return json.loads((path/'failure.json').read_text())
def started(project): return wait_for(lambda: next((r for r in project.runs('toy') if (r/'here').exists()), None), what='the cell started')

def test_success_says_where_and_is_not_repeated(project):
    project.experiment('toy', '# Working', "print('hello from the notebook')", FINISH)
    first = project('run', 'experiments/toy.ipynb')
    assert first.returncode == 0, first.stderr
    assert 'hello from the notebook' in first.stderr and 'Working' in first.stderr      # something moved
    path = project.run('toy')
    assert run_status(path) == ('complete', '')
    assert not {p.name for p in path.iterdir()} & {'run.running.ipynb', 'run.failed.ipynb', 'failure.json'}
    assert str(project.root) not in (path/'run.ipynb').read_text()                      # no machine's folders in what is published
    before = (path/'run.ipynb').stat().st_mtime_ns
    second = project('run', 'toy')
    assert second.returncode == 0 and 'nothing to do' in second.stderr and (path/'run.ipynb').stat().st_mtime_ns == before
    assert second.stdout.strip() == first.stdout.strip() == str(path.relative_to(project.root))   # the folder, for scripts

def test_cell_error(project):
    project.experiment('toy', METRICS, "raise RuntimeError('no such luck')", "print('later')", opened=False)
    r = project('run', 'toy')
    assert r.returncode == 1 and 'Traceback' not in r.stderr
    last = r.stderr.strip().splitlines()[-1]
    path = project.run('toy')
    assert 'RuntimeError: no such luck' in last and 'run.failed.ipynb' in last
    assert failure(path)['reason'] == 'cell error' and "raise RuntimeError" in failure(path)['message']
    assert not (path/'metrics.json').exists() and not (path/'run.ipynb').exists()       # though the notebook had written it
    assert run_status(path).state == 'failed'

def test_killed_kernel_is_never_a_success(project):
    # papermill marks every cell of such a notebook as completed, and records no exception
    project.experiment('toy', METRICS, "os.kill(os.getpid(), signal.SIGKILL)", "print('later')", opened=False)
    with pytest.raises(RunFailed) as e: run_notebook('toy', show=False)
    assert e.value.reason == 'kernel died' and 'signal 9' in e.value.message
    nb = json.loads((e.value.path/'run.failed.ipynb').read_text())
    assert {c['metadata']['papermill']['status'] for c in nb['cells']} == {'completed'}           # the trap
    assert not nb['metadata']['papermill']['exception']
    assert run_status(e.value.path).state == 'failed' and not (e.value.path/'metrics.json').exists()

def test_timeout_leaves_no_kernel(project):
    project.experiment('toy', SLEEP, METRICS, opened=False)
    with pytest.raises(RunFailed, match='longer than 3 s') as e: run_notebook('toy', timeout=3, show=False)
    assert e.value.reason == 'timeout' and not kernels(e.value.path)

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(project, sig):
    project.experiment('toy', f"try: {SLEEP}\nexcept KeyboardInterrupt: (path/'saved').touch(); raise", METRICS, opened=False)
    p = project.start('run', 'toy'); path = started(project)
    p.send_signal(sig); out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Traceback' not in err, err
    assert (path/'saved').exists()                                                      # the notebook had its chance
    assert failure(path)['reason'] == 'interrupted' and not kernels(path) and not (path/'metrics.json').exists()

def test_asking_twice_means_now(project):
    project.experiment('toy', f"signal.signal(signal.SIGINT, lambda *a: (path/'ignored').touch())\nwhile True: {SLEEP}", opened=False)
    p = project.start('run', 'toy'); path = started(project)
    p.send_signal(signal.SIGINT); wait_for((path/'ignored').exists); assert kernels(path)
    p.send_signal(signal.SIGINT); out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Traceback' not in err and not kernels(path)

def test_killed_wrapper_then_continued(project):
    project.experiment('toy', f"if not (path/'here').exists(): {SLEEP}", METRICS, opened=False)
    p = project.start('run', 'toy'); path = started(project)
    status = run_status(path); assert status.state == 'incomplete' and f'still running (process {p.pid})' in status.reason
    with pytest.raises(UserError, match='already running'): run_notebook('toy', show=False)    # the second one refuses
    assert 'already running' in one_sentence(project('run', 'toy'))
    old = kernels(path); p.kill(); p.communicate()
    assert run_notebook('toy', show=False) == path                                      # at once: it waits for the orphan kernel
    assert not set(old) & set(kernels(path)) and run_status(path).state == 'complete' and project.runs('toy') == [path]

def test_again_keeps_the_old_result_until_the_new_one_is_complete(project):
    flag = project.root/'fail'
    project.experiment('toy', f"if pathlib.Path({str(flag)!r}).exists(): raise ValueError('not today')", METRICS, opened=False)
    path = run_notebook('toy', show=False); first = (path/'run.ipynb').read_text()
    flag.touch()
    with pytest.raises(RunFailed): run_notebook('toy', again=True, show=False)
    assert run_status(path).state == 'complete' and (path/'run.ipynb').read_text() == first
    flag.unlink(); (path/'mark').touch()
    assert run_notebook('toy', again=True, show=False) == path
    assert run_status(path).state == 'complete' and not (path/'mark').exists() and project.runs('toy') == [path]

def test_refused_before_anything_starts(project):
    project.experiment('toy', FINISH, params='epochs: int = 3  # passes')
    for kw, said in [(dict(params=dict(epoch=4)), "Did you mean 'epochs'"), (dict(params=dict(epochs='many')), 'not of type int'),
                     (dict(profile='quik'), "Did you mean 'quick'"), (dict(seed=-1), 'seed')]:
        with pytest.raises(UserError, match=said): run_notebook('toy', **kw)
    with pytest.raises(UserError, match="Did you mean 'toy'"): run_notebook('toyy')
    assert not (project.root/'runs').exists()
    (project.root/'elsewhere.ipynb').write_text((project.root/'experiments'/'toy.ipynb').read_text())
    with pytest.raises(UserError, match='experiments/'): run_notebook('elsewhere.ipynb')

def test_two_parameters_two_folders_and_a_last_word_is_needed(project):
    project.experiment('toy', "(path/'metrics.json').write_text('{}') if epochs == 4 else None", params='epochs: int = 3', opened=False)
    with pytest.raises(RunFailed, match='run.finish') as e: run_notebook('toy', show=False)
    assert run_notebook('toy', params=dict(epochs='4'), show=False) != e.value.path

def test_plain_papermill_writes_the_same_run(project):
    import papermill
    project.experiment('toy', FINISH)
    papermill.execute_notebook('experiments/toy.ipynb', 'out.ipynb', dict(profile='quick'), kernel_name='python3', progress_bar=False)
    path = project.run('toy'); status = run_status(path)
    assert status.state == 'incomplete' and 'executed notebook' in status.reason
    assert run_notebook('toy', show=False) == path and run_status(path).state == 'complete'
