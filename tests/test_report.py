"Promotion and rendering: refused by name, marked when old, the same bytes twice."
import json, re, shutil
import nbformat, pytest
from PIL import Image
from conftest import ROOT, one_sentence
from vae_nb.core import UserError, load_settings
from vae_nb.reporting.promote import promote, read_promoted
from vae_nb.reporting.report import find_chromium, readme_mark, report
from vae_nb.runs import repeat_command, resolve_params, run_key, start_run

PAGE = """# Toy

It is {{value toy.quick accuracy .1%}} at $e^{-1}$.

{{table toy.quick result}}

{{figure toy.quick curve}}

{{reproduce toy.quick}}

{{runs}}

{{if toy.full}}never{{else}}{{figure toy.full curve}}{{end}}
"""

def make_run(project, seed=0, profile='quick', finish=True, params=None):
    "A run folder as the runner leaves it, without the kernel."
    nb = project.root/'experiments'/'toy.ipynb'; params = resolve_params(nb, profile, seed, params); key = run_key(nb, params)
    config = dict(name='toy', key=key, profile=profile, seed=seed, params=params)
    run = start_run(project.root/'runs'/'toy'/key, config, nb, command=repeat_command(nb, params))
    (run.path/'figures').mkdir(exist_ok=True); Image.new('RGB', (60, 40), (90, 120, 200)).save(run.path/'figures'/'curve.png')
    run.figures['curve'] = 'A loss that falls.'
    run.tables['result'] = dict(caption='One row', rows=[], markdown='| model | nats |\n|---|---:|\n| toy | 1.500 |')
    cell = nbformat.v4.new_code_cell('1', execution_count=1); cell['id'] = 'cell0'
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), run.path/'run.ipynb')
    if finish: run.finish(accuracy=0.97531)
    return run.path

def page(project, text=PAGE, name='index'):
    cell = nbformat.v4.new_markdown_cell(text); cell['id'] = 'cell0'
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), project.root/'nbs'/f'{name}.ipynb')

@pytest.fixture
def toy(project):
    project.experiment('toy', 'run.finish()', profiles='  quick: {}\n  full: {}\n'); page(project)
    return project

def edit_package(project, module='runs.py'):
    "An edit to one module of a package of the project's own."
    package = project.root/'vae_nb'
    if package.is_symlink(): package.unlink(); shutil.copytree(ROOT/'vae_nb', package, ignore=shutil.ignore_patterns('__pycache__'))
    with open(package/module, 'a') as f: f.write('# edited\n')

def snapshot(root): return {p.relative_to(root): p.read_bytes() for p in root.rglob('*') if p.is_file()}

def test_twice_the_same_bytes_and_nothing_else_touched(toy):
    promote(make_run(toy)); before = snapshot(toy.root)
    files = report(); first = snapshot(toy.root)
    new = {str(p) for p in first if before.get(p) != first[p]}
    assert new == {'README.md', 'report/report.html'} | ({'report/report.pdf'} if find_chromium() else set())
    report(); assert snapshot(toy.root) == first
    if find_chromium():                                              # printed anew, not only left alone
        (toy.root/'report'/'report.pdf').unlink(); report()
        assert snapshot(toy.root) == first and str(toy.root).encode() not in first[files[2].relative_to(toy.root)]

def test_page_holds_numbers_figures_and_where_they_came_from(toy):
    dest = promote(make_run(toy)); report(pdf=False); text = (toy.root/'README.md').read_text()
    assert text.startswith(readme_mark + '\n') and '{{' not in text
    assert 'It is 97.5%' in text and '| toy | 1.500 |' in text and 'A loss that falls.' in text
    link, = re.findall(r'!\[.*?\]\((.*?)\)', text); assert (toy.root/link).exists()
    for target in re.findall(r'(?<!!)\[.*?\]\((.*?)\)', text): assert (toy.root/target).exists()
    assert f'[toy/{dest.name}]' in text and 'profile quick, seed 0' in text
    assert '*Figure not run yet: `vae-nb run experiments/toy.ipynb --profile full`*' in text and 'never' not in text
    assert 'vae-nb run experiments/toy.ipynb --profile quick --seed 0' in text
    html = (toy.root/'report'/'report.html').read_text()
    assert 'data:image/png;base64' in html and '<math' in html and 'src="../figures' not in html
    for target in re.findall(r'<a href="([^"#:]+)"', html): assert (toy.root/'report'/target).exists()

def test_failed_and_incomplete_are_refused_by_name(toy):
    path = make_run(toy, finish=False)
    with pytest.raises(UserError, match=f'{path.name} is incomplete.*metrics.json'): promote(path)
    (path/'failure.json').write_text(json.dumps(dict(reason='cell error', message='ValueError: no')))
    with pytest.raises(UserError, match=f'{path.name} is failed: cell error: ValueError: no'): promote(path)
    assert path.name in one_sentence(toy('promote', path))
    assert not (toy.root/'report').exists()
    done = promote(make_run(toy, seed=1)); nb = json.loads((done/'run.ipynb').read_text()); nb['cells'][0]['execution_count'] = None
    (done/'run.ipynb').write_text(json.dumps(nb))                     # a result whose notebook did not run
    with pytest.raises(UserError, match=f'{done.name} is not the result of a complete run'): report(pdf=False)

def test_older_code_is_marked_and_strict_refuses_it(toy):
    dest = promote(make_run(toy)); report(pdf=False)
    assert 'code has changed' not in (toy.root/'README.md').read_text()
    report(pdf=False, strict=True)
    edit_package(toy, 'studies/dispatch.py'); report(pdf=False, strict=True)      # the notebook does not use it
    edit_package(toy)
    report(pdf=False); text = (toy.root/'README.md').read_text()
    assert text.count('code has changed since') == 2 and '97.5%' in text        # table and figure, still shown
    assert f'toy/{dest.name}' in one_sentence(toy('report', '--strict'))

def test_a_trial_is_marked_wherever_it_is_shown(toy):
    toy.experiment('toy', 'run.finish()', profiles='  tiny: {}\n  quick: {}\n')
    page(toy, '# Toy\n\n{{table toy.tiny result}}\n\n{{runs}}\n')
    promote(make_run(toy, profile='tiny')); done = promote(make_run(toy)); report(pdf=False); text = (toy.root/'README.md').read_text()
    assert text.count('a trial, not a result') == 2                            # below the table, and in the list of runs
    assert all('trial' not in l for l in text.splitlines() if done.name in l)

def test_newer_run_of_the_same_command_replaces_the_older(toy):
    first, other = promote(make_run(toy)), promote(make_run(toy, seed=1))
    edit_package(toy)
    second = promote(make_run(toy))
    assert first != second and {r['path'].name for r in read_promoted()} == {second.name, other.name}
    assert {p.name for p in (toy.root/'figures'/'toy').iterdir()} == {second.name, other.name}
    assert next(r for r in read_promoted() if r['ref'] == 'toy.quick')['path'] == second       # the lowest seed is the one shown

@pytest.mark.parametrize('hole, said', [
    ('{{value toy.quick acuracy}}', "Did you mean 'accuracy'"), ('{{figure toy.quick curves}}', "Did you mean 'curve'"),
    ('{{valu toy.quick accuracy}}', "Did you mean 'value'"), ('{{value toy.quik accuracy}}', "Did you mean 'quick'"),
    ('{{if toy.quick}}', 'no {{end}}'), ('{{end}}', 'belongs to no'), ('{{value toy.quick accuracy .1q}}', 'cannot be written')])
def test_a_wrong_placeholder_is_an_error_and_keeps_the_old_page(toy, hole, said):
    promote(make_run(toy)); (toy.root/'README.md').write_text('old'); page(toy, f'# Toy\n\n{hole}\n')
    with pytest.raises(UserError) as e: report(pdf=False)
    assert said in str(e.value) and (toy.root/'README.md').read_text() == 'old'

def test_without_chromium_the_rest_is_rendered(toy, monkeypatch, capsys):
    import vae_nb.reporting.report as r
    monkeypatch.setattr(r, 'find_chromium', lambda: None); promote(make_run(toy))
    assert [p.name for p in report()] == ['README.md', 'report.html'] and 'no Chromium' in capsys.readouterr().err

def test_the_projects_own_page_is_rendered_and_current():
    s = load_settings(ROOT); text = (s.root/'README.md').read_text()
    if not read_promoted(s): pytest.skip('no run has been promoted yet')
    from vae_nb.reporting.report import page_markdown
    assert text.startswith(readme_mark) and '{{' not in text
    strip = lambda t: re.sub(r' · made by [^·<]*; code has changed since| \(older code\)', '', t)    # these come with each edit
    fresh = f'{readme_mark}\n\n{page_markdown(s, read_promoted(s), s.root)}'
    assert strip(text) == strip(fresh), 'README.md is not current: run vae-nb report'


def test_a_page_of_its_own_is_printed_short_and_stands_in_the_readme_too(toy):
    "Short: one line of origin for the whole page. In the README each figure and table has its own."
    promote(make_run(toy)); page(toy, '# Front\n\n{{page short}}')
    page(toy, '# Short\n\n## Part\n\n{{table toy.quick result}}\n\n{{figure toy.quick curve}}\n\n{{provenance toy.quick}}', 'page_short')
    files = {p.name: p for p in report()}; text = files['README.md'].read_text()
    assert '## Short' in text and '### Part' in text and text.count('profile quick, seed 0') == 3
    html = files['short.html'].read_text()
    assert html.count('profile quick, seed 0') == 1 and 'toy' in html and 'data:image/png;base64' in html
    assert not find_chromium() or files['short.pdf'].read_bytes().startswith(b'%PDF')


def test_a_short_page_must_say_where_its_numbers_come_from(toy):
    promote(make_run(toy)); page(toy, '{{table toy.quick result}}', 'page_short')
    with pytest.raises(UserError, match='its numbers would name no run'): report(pdf=False)
