#!/usr/bin/env bash
# Ends exactly the daemons that start.sh started in $LAB, by their pid files, and the jobs they run.
#   --wipe   removes $LAB too
set -uo pipefail
LAB=${LAB:-/var/lib/kdpipe-slurm}

end() { # end PIDFILE NAME
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]; then
    kill -TERM "$pid" 2>/dev/null
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null
  fi
  rm -f "$1"
}

# Jobs first: a stopped slurmd leaves its slurmstepd and their children running.
if [ -s "$LAB/etc/slurm.conf" ] && kill -0 "$(cat "$LAB/run/slurmctld.pid" 2>/dev/null)" 2>/dev/null; then
  export SLURM_CONF=$LAB/etc/slurm.conf
  ids=$(squeue -h -o %A 2>/dev/null | sort -u)
  if [ -n "$ids" ]; then
    scancel $ids 2>/dev/null
    for _ in $(seq 100); do
      [ -z "$(squeue -h -o %A 2>/dev/null)" ] && break
      sleep 0.2
    done
  fi
fi
for file in "$LAB"/run/slurmd-*.pid; do [ -e "$file" ] && end "$file" slurmd; done
end "$LAB/run/slurmctld.pid" slurmctld
end "$LAB/munge/munged.pid" munged
[ "${1:-}" = --wipe ] && rm -rf "$LAB"
echo "slurm-lab: stopped" >&2
