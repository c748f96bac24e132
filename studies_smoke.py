import torch,time,sys
import numpy as np
from decoding import *
from decoding.tasks.stdlib import StdlibTask
from decoding.exploration import ExploringWidth
from decoding.traces import TraceRecorder
from controller.features import ContextFeatures, LAYER, CANDIDATE
from controller.network import WidthNet
from controller.policy import LearnedWidth
pair=ModelPair.tiny()
P=StdlibTask().prompts('val',4,pair.tokenizer)
cfg=DecodingConfig(target_width=4,draft_width=32,draft_depth=4,top_k=10,max_new_tokens=24,verification='shared_noise')
g=lambda:[torch.Generator().manual_seed(i) for i in range(4)]
T=[p.tokens for p in P]
a=beam_sample(pair.target,T,cfg,g())
recs=[TraceRecorder(ContextFeatures()) for _ in T]
for r,p in zip(recs,P): r.start(p.id,'val')
b=DSBDDecoder(pair,cfg,ExploringWidth()).generate(T,g(),recs)
print(sum(x.sequences==y.sequences for x,y in zip(a,b)))
rows=[row for r in recs for row in r.take_rows()]
print(len(rows)); r=rows[5]; print({k:(v if np.size(v)<12 else np.shape(v)) for k,v in r.items()}); print(r['places'])
print(np.mean([sum(p>0 for p in r['places']) for r in rows if r['layer']==1]),np.mean([sum(p>0 for p in r['places']) for r in rows if r['layer']==3]))
torch.manual_seed(0)
net=WidthNet(4)
lw=LearnedWidth(net,{'features':{'names':list(LAYER),'candidate_names':list(CANDIDATE),'version':3},'pair':pair.describe()})
c=DSBDDecoder(pair,cfg,lw).generate(T,g())
print(sum(x.sequences==y.sequences for x,y in zip(a,c)), sum(r.stats.new_tokens for r in c)/sum(r.stats.iterations for r in c))
print(c[0].stats.records[:3])
s=sum(sum(r.stats.seconds.values()) for r in c); print(s, sum(r.stats.seconds['policy'] for r in c)/sum(r.stats.iterations for r in c))
