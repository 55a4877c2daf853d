#!/usr/bin/env bash
# Runs a small demo on a real SLURM: a controller and two nodes on this machine, which are started and stopped here.
#
#   apt-get install slurm-wlm munge     # once, on Debian or Ubuntu
#   tests/manual/slurm.sh [FOLDER]      # as root, since slurmd needs it; about five minutes on two quiet cores
#
# It copies the project to FOLDER (default: a new folder in /tmp), runs all jobs through profiles/slurm, and has SLURM kill
# a training at a time limit of one minute, which then goes on where it was. It fails if anything of that does not hold.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=${1:-$(mktemp -d /tmp/wsss-slurm.XXXX)}
mkdir -p "$work"/{etc,state,spool,logs,project}
for program in munged slurmctld slurmd sbatch snakemake; do
    command -v $program >/dev/null || { echo "error: $program is not on the PATH; see the head of $0"; exit 1; }
done

# SLURM's jobs read /etc/slurm/slurm.conf. In a mount namespace of its own, the trial has another.
if [ -z "${WSSS_TRIAL:-}" ]; then
    mkdir -p /etc/slurm
    WSSS_TRIAL=1 exec unshare --mount "$0" "$work"
fi
mount --bind "$work/etc" /etc/slurm

pids=()
stop() {
    trap - EXIT INT TERM
    timeout 10 scancel --user="$(id -un)" || true
    kill "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" || true
}
trap stop EXIT
trap 'exit 130' INT TERM

host=$(hostname -s)
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=trial
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17002
SlurmUser=$(id -un)
SlurmctldPidFile=$work/slurmctld.pid
SlurmctldLogFile=$work/logs/slurmctld.log
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmdPidFile=$work/slurmd-%n.pid
SlurmdLogFile=$work/logs/%n.log
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=30
InactiveLimit=0
MinJobAge=600
# Two nodes of this machine that claim to have four processors and a GPU each, since the profile asks for GPUs
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17011 CPUs=4 RealMemory=64000 Gres=gpu:1
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17012 CPUs=4 RealMemory=64000 Gres=gpu:1
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
CONF
printf 'NodeName=node1 Name=gpu Count=1 File=/dev/null\nNodeName=node2 Name=gpu Count=1 File=/dev/null\n' >/etc/slurm/gres.conf

head -c 1024 /dev/urandom >"$work/munge.key" && chmod 400 "$work/munge.key"
# --force: this key and socket lie in a folder that others may enter
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
    --log-file="$work/logs/munged.log" --seed-file="$work/munge.seed" >/dev/null 2>&1 &
pids+=($!)
while [ ! -S "$work/munge.socket" ]; do kill -0 "${pids[0]}"; sleep 0.2; done
slurmctld -D -c >/dev/null 2>&1 & pids+=($!)
for node in node1 node2; do slurmd -D -N $node >/dev/null 2>&1 & pids+=($!); done
for _ in $(seq 60); do
    [ "$(sinfo --noheader --Node --format=%T 2>/dev/null | grep -c idle)" = 2 ] && break
    sleep 1
done
sinfo --Node --long

git -C "$project" ls-files -co --exclude-standard | (cd "$project" && tar --create --files-from=-) | tar --extract -C "$work/project"
cd "$work/project"
rm -rf .dvc
cat >profiles/trial.yaml <<'YAML'
experiment: trial
rows: [cam, supervised]
method: cam
first: []
dataset: {root: data/trial, demo: {train: 48, evaluation: 12, size: 64, seed: 0}}
saliency: {path: data/trial/Saliency}
defaults:
  classifiers: {training: {epochs: 4, milestones: [3]}}
  segmentations: {training: {epochs: 2, milestones: [1]}}
YAML
printf 'defaults:\n  segmentations: {training: {epochs: 600, milestones: [400]}}\n' >profiles/long.yaml

# One thread each, since the nodes share this machine. Without accounting, squeue knows what became of a job.
run() {
    snakemake --profile profiles/slurm --configfile params.yaml profiles/trial.yaml "$@" --max-threads 1 --quiet rules \
        --default-resources mem_mb=3000 runtime=60 slurm_account=trial slurm_partition=main --latency-wait 10 \
        --slurm-status-command squeue --slurm-init-seconds-before-status-checks 5 --seconds-between-status-checks 5
}
logs=results/trial/logs
started=$SECONDS
echo "== All jobs, on two nodes"
run
echo "all jobs: $((SECONDS - started)) s"
grep --no-filename --only-matching --recursive 'on node[12]' $logs | sort | uniq -c

echo "== Trainings whose first attempt has a time limit of one minute"
started=$SECONDS
# Only the first attempt has the limit: SLURM looks at it every 30 s, and counts a job that ends between limit and look as
# killed, so that Snakemake would delete its outputs and start it over.
run profiles/long.yaml --set-resources 'segmentation:runtime=1 if attempt == 1 else 60'
echo "with the time limit: $((SECONDS - started)) s"
grep -E 'on node|resumes|epoch 600/600|done' $logs/segmentations/supervised.log
grep --quiet 'resumes from epoch' $logs/segmentations/supervised.log
grep --no-filename --recursive 'TIME LIMIT' .snakemake/slurm_logs "$work/logs" | tail -n 3
echo "== SLURM ran and killed"
squeue --states=all --noheader --format='%i %T %N %M' | awk '{count[$2 " on " $3]++} END {for (key in count) print count[key], key}'
test "$(squeue --states=TIMEOUT --noheader | wc -l)" -ge 1
echo "the trial succeeded"
