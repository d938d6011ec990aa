#!/usr/bin/env bash
# A real Slurm on this one machine, from nothing, as root and without systemd. What runs already is left alone.
#
#   tools/slurm_lab/start.sh      installs what lacks (Debian's packages), writes the configuration, starts, waits
#   . $LAB/env.sh                 SLURM_CONF for sbatch, squeue, srun, scontrol
#   tools/slurm_lab/stop.sh       ends exactly these daemons; --wipe removes $LAB too
#
# Settings (environment):
#   LAB=/var/lib/kdpipe-slurm     all that is written: key, configuration, state, spool, logs, pids
#   NODES=2 CPUS=4 GPUS=2         nodes n1, n2 .. on 127.0.0.1, what each claims to have; GPUs are pretended
#   PORT=16917                    slurmctld's; the nodes take PORT+1, PORT+2 ..
#   SILENCE=60                    seconds after which a node that does not answer is down
# Partitions: main; urgent, which preempts it by requeue; scavenge, whose preempted jobs are cancelled.
# Exit code 77: this machine cannot have one (not root, no apt-get, no packages).
set -euo pipefail
LAB=${LAB:-/var/lib/kdpipe-slurm} NODES=${NODES:-2} CPUS=${CPUS:-4} GPUS=${GPUS:-2}
PORT=${PORT:-16917} SILENCE=${SILENCE:-60}
export PATH=$PATH:/usr/sbin:/sbin

say() { printf 'slurm-lab: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
cannot() { say "$*"; exit 77; }

[ "$(id -u)" = 0 ] || cannot "not root"

# The daemons outlive whoever started them: they must not keep a lock or a pipe of theirs open.
for fd in /proc/$$/fd/*; do
  fd=${fd##*/}
  if [ "$fd" -gt 2 ] && [ "$fd" -ne 255 ]; then eval "exec $fd>&-"; fi # 255 is this script
done

# --- packages. policy-rc.d answers 101: dpkg starts no service ---------------------------------------------------
there() { command -v slurmctld slurmd sbatch munged >/dev/null; }
if ! there; then
  command -v apt-get >/dev/null || cannot "Slurm is not installed, and there is no apt-get"
  guard=
  if ! [ -e /usr/sbin/policy-rc.d ]; then
    guard=/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' >"$guard"
    chmod 755 "$guard"
  fi
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; } \
    >/dev/null || true
  [ -z "$guard" ] || rm -f "$guard"
  there || cannot "apt-get has no slurmctld, slurmd, slurm-client and munge for this system"
fi

# --- folders -----------------------------------------------------------------------------------------------------
umask 022
mkdir -p "$LAB"/{etc,run,state,log,munge,dev}
chmod 755 "$LAB" "$LAB"/{etc,run,state,log,dev}
chmod 711 "$LAB/munge"

alive() { # alive PIDFILE NAME: the pid in the file is a living process of that name
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 1
  [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]
}

# --- munge, with a key and a socket of its own -------------------------------------------------------------------
if ! [ -s "$LAB/munge/key" ]; then
  (umask 077; head -c 1024 /dev/urandom >"$LAB/munge/key")
fi
chmod 600 "$LAB/munge/key"
chown 0:0 "$LAB/munge" "$LAB/munge/key"
if ! alive "$LAB/munge/munged.pid" munged; then
  munged --force --key-file="$LAB/munge/key" --socket="$LAB/munge/socket" --pid-file="$LAB/munge/munged.pid" \
    --log-file="$LAB/munge/munged.log" --seed-file="$LAB/munge/munged.seed" --num-threads=2
fi

# --- configuration -----------------------------------------------------------------------------------------------
host=$(hostname -s 2>/dev/null || hostname)
gpu_types='' gpu_nodes=''
: >"$LAB/etc/gres.conf"
if [ "$GPUS" -gt 0 ]; then
  gpu_types="GresTypes=gpu" gpu_nodes="Gres=gpu:$GPUS"
  for gpu in $(seq 0 $((GPUS - 1))); do
    [ -e "$LAB/dev/gpu$gpu" ] || mknod "$LAB/dev/gpu$gpu" c 1 3
  done
  printf 'AutoDetect=off\nName=gpu File=%s\n' "$LAB/dev/gpu[0-$((GPUS - 1))]" >"$LAB/etc/gres.conf"
fi
{
  cat <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmctldParameters=preempt_send_user_signal
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$LAB/munge/socket,cred_expire=5
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool-%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd-%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd-%n.log
CommunicationParameters=NoAddrCache
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.txt
JobRequeue=1
KillWait=5
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=$SILENCE
SlurmctldTimeout=30
InactiveLimit=0
Waittime=0
SlurmdParameters=config_overrides
$gpu_types
CONF
  for node in $(seq "$NODES"); do
    echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + node)) CPUs=$CPUS RealMemory=4000" \
      "$gpu_nodes State=UNKNOWN"
  done
  cat <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=ALL MaxTime=60 State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=10
CONF
} >"$LAB/etc/slurm.conf.new"
mv "$LAB/etc/slurm.conf.new" "$LAB/etc/slurm.conf"
printf 'export SLURM_CONF=%q\n' "$LAB/etc/slurm.conf" >"$LAB/env.sh"
. "$LAB/env.sh"

# --- daemons -----------------------------------------------------------------------------------------------------
alive "$LAB/run/slurmctld.pid" slurmctld || slurmctld -f "$SLURM_CONF" ||
  die "slurmctld: $(grep -m1 fatal: "$LAB/log/slurmctld.log")"
for node in $(seq "$NODES"); do
  mkdir -p "$LAB/spool-n$node"
  alive "$LAB/run/slurmd-n$node.pid" slurmd || slurmd -f "$SLURM_CONF" -N "n$node" ||
    die "slurmd n$node: $(grep -m1 fatal: "$LAB/log/slurmd-n$node.log")"
done

for _ in $(seq 150); do
  up=$(sinfo -h -N -p main -o %t 2>/dev/null | grep -cxE 'idle|mix|alloc|comp') || up=0
  [ "$up" = "$NODES" ] && { say "up: $NODES nodes; . $LAB/env.sh"; exit 0; }
  sleep 0.2
done
sinfo -N -l >&2 || true
tail -n 20 "$LAB"/log/*.log >&2 || true
die "the nodes did not come up"
