"A notebook in a real JupyterLab in a real browser: open it, run all cells, see a figure."
import os, shutil, socket, subprocess, sys, time, urllib.request
import nbformat, pytest
from conftest import ROOT
from vae_nb.reporting.report import find_chromium

CHROMIUM = find_chromium()
try: from playwright.sync_api import expect, sync_playwright
except ImportError: sync_playwright = None

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason='no Chromium or Chrome on this machine'),
              pytest.mark.skipif(sync_playwright is None, reason='playwright is not installed')]

PANEL = """import tempfile
from vae_nb.data.datasets import make_dataset
from vae_nb.training.trainer import fit
small = dict(width=8, depth=0, latent_dim=16, epochs=3, batch_size=64, focal_gamma=0, class_weights='none', device='cpu', beta_max=50.)
fit(small, tempfile.mkdtemp() + '/run', make_dataset('simplified', 3000, seed=0), progress='panel')['status']"""

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a copy of the book (it writes checkpoints beside what it opens), with settings of its own."
    root = tmp_path/'copy'; root.mkdir()
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for n in ('nbs', 'vae_nb', 'experiments'): shutil.copytree(ROOT/n, root/n, ignore=skip)
    for n in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/n, root/n)
    own = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PANEL)], metadata=own), root/'nbs'/'panel.ipynb')
    own = {k: str(tmp_path/k.lower()) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_SETTINGS_DIR',
                                                'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR')}
    port = free_port(); url = f'http://127.0.0.1:{port}'
    with open(tmp_path/'lab.log', 'w') as log:
        p = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}',
            '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--ServerApp.password=',
            '--allow-root', f'--ServerApp.root_dir={root}', '--LabApp.news_url=None',
            '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'], env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            try: urllib.request.urlopen(f'{url}/api/status', timeout=2); break
            except OSError: time.sleep(0.2)
        else: raise AssertionError((tmp_path/'lab.log').read_text()[-2000:])
        yield url
    finally: p.terminate(); p.wait(20)

@pytest.mark.parametrize('name', ['11_shapes', 'panel'])      # panel: a training that draws itself while it runs
def test_run_all_shows_a_figure(lab, name, tmp_path):
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1280, height=8000))        # tall: JupyterLab draws only the cells in view
        page.goto(f'{lab}/lab/tree/nbs/{name}.ipynb?reset')
        nb = page.locator('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook'); nb.locator('.jp-CodeCell').first.wait_for(timeout=60_000)
        page.get_by_text('| Idle').wait_for(timeout=60_000)                    # before that, Run All is silently dropped
        def menu(*names):
            for n in names: page.get_by_role('menuitem', name=n, exact=True).click()
        menu('Edit', 'Clear Outputs of All Cells')
        expect(nb.locator('.jp-OutputArea-output img')).to_have_count(0)       # so the figure seen below was made just now
        menu('Run', 'Run All Cells')
        image = nb.locator('.jp-OutputArea-output img').first; expect(image).to_be_visible(timeout=120_000)
        page.get_by_text('| Idle').wait_for(timeout=120_000)
        assert image.evaluate('i => i.naturalWidth') > 50
        assert nb.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        if name == 'panel': expect(nb.locator('.jp-OutputArea-output img')).to_have_count(1)        # drawn anew in its place
        if os.environ.get('VAE_NB_SCREENSHOT'): page.screenshot(path=os.environ['VAE_NB_SCREENSHOT'])
        browser.close()
