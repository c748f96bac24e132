import os, sys, time, json, itertools, warnings
os.environ.setdefault("OMP_NUM_THREADS","1"); warnings.filterwarnings("ignore")
import numpy as np, torch
torch.set_num_threads(1)
import multiprocessing as mp
from dataclasses import asdict
from pathlib import Path
from decoding import *
from decoding.tasks.stdlib import StdlibTask
from decoding.exploration import ExploringWidth
from decoding.traces import TraceRecorder, write_shard, write_manifest
from controller.features import ContextFeatures, LAYER, CANDIDATE, VERSION
from controller.network import WidthNet
from controller.policy import LearnedWidth
import controller.plan as plan
OUT=Path(os.environ.get("OUT","/tmp/study")); SCALE=float(os.environ.get("SCALE","1"))
R=int(os.environ.get("R","4")); W=int(os.environ.get("W","48")); G=int(os.environ.get("G","5"))
CFG=DecodingConfig(target_width=R,draft_width=W,draft_depth=G,top_k=10,max_new_tokens=64,verification='shared_noise')
PAIR=None; PROMPTS={}
def setup():
    global PAIR
    if PAIR is None:
        PAIR=ModelPair.tiny()
        n=dict(train=int(160*SCALE),val=int(48*SCALE),test=int(160*SCALE))
        for s in n: PROMPTS[s]=StdlibTask().prompts(s,n[s],PAIR.tokenizer)
class Costs:
    unit="table"
    def __init__(self,D): self.D=D
    def draft_cost(self,n): return self.D if n>0 else 0.0
    def target_cost(self,n): return 1+.004*max(0,n-64)
    def host_cost(self,l): return .03*l
def cost(rec,D): return 1+.004*max(0,rec.scored-64)+D*len(rec.draft_passes)+.03*len(rec.drafts)
class Hand(FixedWidth):
    def __init__(self,w,d,skip,gap=None):
        super().__init__(None,w,d); self.skip=skip; self.gap=gap; self._gap=9.; self.chooses=gap is not None
    def ask_draft(self,c,l,parents): return parents.unknown_share>=self.skip
    def draft_further(self,c,l,widths):
        if l==1: self._sum=0.
        return super().draft_further(c,l,widths) and (self.gap is None or l==1 or self._sum<=self.gap)
    def choose(self,c):
        k=np.log(c.candidates.keys); w=min(self.fixed_draft_width,len(k)); 
        # key-gap: chance that the layer fails, logistic in the distance of the first key left out from the R-th
        g=(k[w] if w<len(k) else k[-1]+1)-k[min(R,len(k))-1]
        self._sum+=np.log1p(np.exp(-(g-1.5)))   # -log of the product of pass chances
        return np.arange(w)
    def send(self,layers): return [np.ones(len(m),bool) for m in self._m(layers)]
    def _m(self,layers): return [range(min(self.fixed_draft_width,len(c.candidates))) for c in layers]
def learned(spec):
    net,hope,skip,D=spec
    m=LearnedWidth(net,{'features':{'names':list(LAYER),'candidate_names':list(CANDIDATE),'version':VERSION},'pair':PAIR.describe()},latency=Costs(D),clock='table')
    m.plan.hope, m.plan.skip=hope,skip
    return m
def seeds(ps): return [torch.Generator().manual_seed(int.from_bytes(__import__('hashlib').sha256(p.id.encode()).digest()[:6],'big')) for p in ps]
def job(a):
    setup(); kind,spec,split,lo,hi=a; ps=PROMPTS[split][lo:hi]; T=[p.tokens for p in ps]
    try:
        if kind=='trace':
            recs=[TraceRecorder(ContextFeatures()) for _ in ps]
            for r,p in zip(recs,ps): r.start(p.id,split)
            DSBDDecoder(PAIR,CFG,ExploringWidth(1)).generate(T,seeds(ps),recs)
            return [row for r in recs for row in r.take_rows()]
        if kind=='plain':
            return [(p.id,r.stats.new_tokens,r.sequences) for p,r in zip(ps,beam_sample(PAIR.target,T,CFG,seeds(ps)))]
        pol=Hand(*spec) if kind=='hand' else learned(spec)
        if kind=='learned' : spec[0].eval()
        res=DSBDDecoder(PAIR,CFG,pol).generate(T,seeds(ps),batch_size=8)
        return [(p.id,r.stats.new_tokens,[(x.scored,len(x.draft_passes),len(x.drafts)) for x in r.stats.records],r.stats.seconds['policy']/max(r.stats.iterations,1),r.sequences) for p,r in zip(ps,res)]
    except Exception as e:
        import traceback; traceback.print_exc(); raise
def run(pool,kind,spec,split,chunk=None):
    n=len(PROMPTS[split]); chunk=chunk or max(1,(n+15)//16)
    return [pool.apply_async(job,((kind,spec,split,i,min(i+chunk,n)),)) for i in range(0,n,chunk)]
def get(rs): return [x for r in rs for x in r.get()]
def speed(rows,D,each=False):
    t=np.array([r[1] for r in rows],float); c=np.array([sum(1+.004*max(0,s-64)+D*p+.03*l for s,p,l in r[2]) for r in rows])
    return (t,c) if each else t.sum()/c.sum()
def boot(a,b,D,n=2000):
    ta,ca=speed(a,D,True); tb,cb=speed(b,D,True); g=np.random.default_rng(0); i=g.integers(0,len(ta),(n,len(ta)))
    r=(ta[i].sum(1)/ca[i].sum(1))/(tb[i].sum(1)/cb[i].sum(1)); return (ta.sum()/ca.sum())/(tb.sum()/cb.sum()),*np.quantile(r,[.025,.975])
def main():
    t0=time.time(); setup(); P=int(os.environ.get("PROCS","16"))
    def say(*a): print(f"[{time.time()-t0:5.0f}]",*a,flush=True)
    import controller.host as H
    h=H.HostNet(WidthNet(R)); h.chances(np.zeros((20,len(CANDIDATE)),np.float32),np.zeros(len(LAYER),np.float32),np.zeros(20,np.float32)); plan.best_count(np.zeros(3),3,np.zeros(9),1.0); say("compiled")
    with mp.get_context("fork").Pool(P) as pool:
        d=OUT/"traces"; d.mkdir(parents=True,exist_ok=True)
        tr={s:get(run(pool,'trace',None,s)) for s in ('train','val')}
        say("traces",{s:len(r) for s,r in tr.items()})
        shards=[write_shard(d,f"traces-0000{i}.parquet",rows,{"trace_key":"x","feature_names":[]}) for i,rows in enumerate(tr.values())]
        write_manifest(d,{"schema_version":3,"trace_key":"x","complete":True,"shards":shards,"rows":sum(map(len,tr.values())),"prompts":1,"features":{"names":list(LAYER),"candidate_names":list(CANDIDATE),"version":VERSION},"decoding":asdict(CFG),"pair":PAIR.describe()})
        # hand rules start while the network trains
        hands=[(w,dd,s) for w in (16,20,24,28,32,48) if w>=2*R for dd in (1,2,3,4,5) if w*dd<=160 for s in (.05,.12,.25)]
        hands+= [(w,5,s,g) for w in (20,24,32) for s in (.05,.12,.25) for g in (.3,.6,1.,1.5,2.2)]
        hr={h:run(pool,'hand',h,'val') for h in hands}
        from controller.data import TraceDataModule
        from controller.module import ControllerModule
        from controller.calibration import calibrate
        from lightning import Trainer
        import logging; logging.getLogger("lightning.pytorch").setLevel(40)
        torch.manual_seed(0)
        data=TraceDataModule(d,batch_size=64); mod=ControllerModule(R)
        say("iterations",{s:len(r) for s,r in data.rows.items()},"params",mod.net.parameter_count())
        t1=time.time(); Trainer(max_epochs=int(os.environ.get("EPOCHS","12")),accelerator="cpu",logger=False,enable_checkpointing=False,enable_progress_bar=False,enable_model_summary=False).fit(mod,data)
        say("trained",time.time()-t1); mod.eval(); calibrate(mod.net,data.rows["val"].columns)
        for k,v in mod.evaluate(data.rows["val"].columns).items(): print("  ",k,round(v,4))
        print("  rates",mod.net.after.rates.tolist(),mod.net.before.rates.tolist(),mod.net.before.linear.weight.tolist(),float(mod.net.temperature))
        torch.save(mod.net.state_dict(),OUT/"net.pt"); net=mod.net.eval().requires_grad_(False)
        ls=[(h,s,D) for D in (.1,.2,.3) for h in (1.,1.3,1.7) for s in (.4,.8,1.4)]
        lr={l:run(pool,'learned',(net,*l),'val') for l in ls}
        hv={h:get(r) for h,r in hr.items()}; say("hand val done")
        lv={l:get(r) for l,r in lr.items()}; say("learned val done")
        best={}
        for D in (.1,.2,.3):
            sc=sorted(((speed(v,D),h) for h,v in hv.items()),reverse=True); print("D",D,"hand",[(round(a,3),h) for a,h in sc[:5]],"gap best",next((round(a,3),h) for a,h in sc if len(h)==4),"noskip",next((round(a,3),h) for a,h in sc if h[2]==.05))
            sl=sorted(((speed(v,D),l) for l,v in lv.items() if l[2]==D),reverse=True); print("      learned",[(round(a,3),l) for a,l in sl])
            best[D]=([h for _,h in sc[:3]],sl[0][1])
        say("policy us/iter",np.mean([r[3] for v in lv.values() for r in v])*1e6)
        hset={h for D in best for h in best[D][0]}
        tp=run(pool,'plain',None,'test'); th={h:run(pool,'hand',h,'test') for h in hset}; tl={D:run(pool,'learned',(net,*best[D][1]),'test') for D in best}
        th={h:get(r) for h,r in th.items()}; tl={D:get(r) for D,r in tl.items()}; tp={x[0]:x for x in get(tp)}
        for D in best:
            print("TEST D",D,"learned",round(speed(tl[D],D),4),best[D][1],"tokens/pass",sum(r[1] for r in tl[D])/sum(len(r[2]) for r in tl[D]),"equal",sum(r[4]==tp[r[0]][2] for r in tl[D]),len(tl[D]))
            for h in best[D][0]: print("   hand",h,round(speed(th[h],D),4),"ratio",[round(x,4) for x in boot(tl[D],th[h],D)],"tokens/pass",sum(r[1] for r in th[h])/sum(len(r[2]) for r in th[h]))
        say("done")
if __name__=="__main__": main()
