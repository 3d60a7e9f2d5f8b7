import sys, time, json
from pathlib import Path
import torch
torch.set_num_threads(1)
import tasks
from trainer.launch.compose import compose_run
from trainer.run import train
from trainer.rundir import RunDirectory
import shutil
name, *o = sys.argv[1:]
d = Path("/tmp/dino/try")/name; shutil.rmtree(d, ignore_errors=True)
t=time.process_time()
base=["task=dino","loop.log_every=11","loop.progress=none","logger.plots=false","dataset.num_workers=0","loop.keep_checkpoints=0","loop.preview_every=null"]
train(compose_run(*base,*o), RunDirectory(d))
rows=[json.loads(l) for l in (d/"metrics.jsonl").open()]
print(name, "cpu %.0f s"%(time.process_time()-t))
for r in rows:
    if "val/knn_top1" in r: print("   ", r["step"], {k[4:]: round(v,3) for k,v in r.items() if k.startswith("val/") and "seconds" not in k})
print("   loss", [round(r["train/loss"],2) for r in rows if "train/loss" in r][::2])
