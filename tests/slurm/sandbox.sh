#!/usr/bin/env bash
# sandbox.sh install|up|down|status|env   -- a throw-away, two-node, real SLURM (slurmctld, slurmdbd+MariaDB, 2 slurmd, munge)
# Debian 12, no systemd, no cgroups, no network beyond loopback. Everything it writes lies in $SLURM_SANDBOX (and two lines in
# /etc/hosts, as node names must resolve). `install` needs root; `up` works for everybody once the packages are there.
#   sandbox.sh install; sandbox.sh up && . "$SLURM_SANDBOX/env.sh" && sinfo      ...      sandbox.sh down
# Several at once need different SLURM_SANDBOX and SLURM_PORT.
set -euo pipefail
ROOT=${SLURM_SANDBOX:-${TMPDIR:-/tmp}/slurm-sandbox-$(id -u)}
BASE=${SLURM_PORT:-26817}                 # ctld=BASE dbd=BASE+2 slurmd=BASE+11.. srun=BASE+100..
NODES=${SLURM_NODES:-2}; NCPU=${SLURM_CPUS:-4}; NMEM=${SLURM_MEM:-8000}
ACCT=${SLURM_ACCT:-dbd}                   # dbd = sacct works; none = sacct disabled (negative tests)
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH LC_ALL=C
say(){ echo "slurm sandbox: $*" >&2; }
die(){ say "FAILED: $*"; tail -n 15 "$ROOT"/log/*.log >&2 2>/dev/null || true; exit 1; }
wait_for(){ local t=$1 what=$2; shift 2; local e=$((SECONDS+t)); until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $e ] || die "$what not up in ${t}s"; sleep 0.2; done; }
alive(){ [ -s "$ROOT/run/$1.pid" ] && kill -0 "$(cat "$ROOT/run/$1.pid")" 2>/dev/null; }

down(){ # newest first; only pids recorded by us
  [ -d "$ROOT/run" ] || { say "nothing to stop"; return 0; }
  [ -s "$ROOT/slurm.conf" ] && alive slurmctld && SLURM_CONF=$ROOT/slurm.conf timeout 10 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
  local n p pids=(); for n in $(cd "$ROOT/run"; ls -- *.pid 2>/dev/null | sed 's/\.pid$//' | sort -r); do
    alive "$n" || continue; p=$(cat "$ROOT/run/$n.pid"); pids+=("$p"); kill -TERM "$p" 2>/dev/null || true
  done # all at once: nothing that they would still write is kept
  for p in "${pids[@]}"; do
    for _ in $(seq 20); do kill -0 "$p" 2>/dev/null || break; sleep 0.1; done; kill -KILL "$p" 2>/dev/null || true
  done; rm -rf -- "$ROOT"; say "down"; }

missing(){ local need=(); command -v munged >/dev/null || need+=(munge); command -v slurmctld >/dev/null || need+=(slurmctld slurm-client)
  command -v slurmd >/dev/null || need+=(slurmd); [ "$ACCT" = none ] || { command -v slurmdbd >/dev/null || need+=(slurmdbd); command -v mariadbd >/dev/null || need+=(mariadb-server); }
  echo "${need[*]}"; }

install(){ local need; need=$(missing); [ -n "$need" ] || return 0
  [ "$(id -u)" = 0 ] || die "need root to install: $need"
  command -v apt-get >/dev/null || die "no apt-get to install with: $need"
  say "installing $need"; export DEBIAN_FRONTEND=noninteractive
  # keep maintainer scripts from starting daemons
  [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; RC=1; }
  # shellcheck disable=SC2086
  apt-get -qq update && apt-get -qq install -y --no-install-recommends $need >/dev/null; [ -z "${RC:-}" ] || rm -f /usr/sbin/policy-rc.d; }

up(){ local t0=$SECONDS U need; U=$(id -un)
  need=$(missing); [ -z "$need" ] || die "these packages are missing: $need ($0 install)"
  if alive slurmctld; then say "already up"; return 0; fi
  rm -rf -- "$ROOT"; mkdir -p "$ROOT"/{run,log,state,db}; chmod 755 "$ROOT"
  local H; H=$(hostname -s)
  # --- munge (own key, own socket)
  ( umask 077; mkdir -p "$ROOT/munge"; dd if=/dev/urandom of="$ROOT/munge/key" bs=1024 count=1 status=none ); chmod 711 "$ROOT/munge"
  munged --force --key-file="$ROOT/munge/key" --socket="$ROOT/munge/sock" --pid-file="$ROOT/run/a_munged.pid" \
     --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munge/seed" >/dev/null 2>&1 || die munged
  wait_for 10 munge munge -n -S "$ROOT/munge/sock"
  # --- nodes: names must resolve (submitit resolves MASTER_ADDR from the node list)
  local i names=() lines=""; for i in $(seq "$NODES"); do names+=("n$i")
    getent hosts "n$i" >/dev/null || { [ -w /etc/hosts ] && echo "127.0.0.1 n$i # slurm-sandbox" >> /etc/hosts || say "warning: n$i does not resolve"; }
    lines+="NodeName=n$i NodeHostname=$H NodeAddr=127.0.0.1 Port=$((BASE+10+i)) CPUs=$NCPU RealMemory=$NMEM State=UNKNOWN"$'\n'; mkdir -p "$ROOT/spool-n$i"; done
  local acct="AccountingStorageType=accounting_storage/none"
  if [ "$ACCT" != none ]; then
    mariadb-install-db --no-defaults --datadir="$ROOT/db/data" --auth-root-authentication-method=normal --skip-test-db $([ "$(id -u)" = 0 ] && echo --user=root) >"$ROOT/log/mariadb-install.log" 2>&1 || die mariadb-install-db
    setsid mariadbd --no-defaults --datadir="$ROOT/db/data" --socket="$ROOT/db/sock" --pid-file="$ROOT/run/b_mariadbd.pid" --bind-address=127.0.0.1 --port=$((BASE+3)) --skip-name-resolve \
      --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --log-error="$ROOT/log/mariadbd.log" $([ "$(id -u)" = 0 ] && echo --user=root) </dev/null >/dev/null 2>&1 &
    local my=(mariadb --no-defaults --socket="$ROOT/db/sock" -u root); wait_for 30 mariadb "${my[@]}" -e 'select 1'
    "${my[@]}" -e "create database slurm_acct_db; create user 'slurm'@'127.0.0.1' identified by 'sandbox'; grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1'"
    ( umask 077; cat > "$ROOT/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/sock
DbdHost=localhost
DbdPort=$((BASE+2))
SlurmUser=$U
LogFile=$ROOT/log/slurmdbd.log
PidFile=$ROOT/run/c_slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((BASE+3))
StorageUser=slurm
StoragePass=sandbox
StorageLoc=slurm_acct_db
C
    )
    acct="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$((BASE+2))
AccountingStoragePass=$ROOT/munge/sock"
  fi
  cat > "$ROOT/slurm.conf" <<C
ClusterName=sandbox
SlurmctldHost=$H(127.0.0.1)
SlurmUser=$U
SlurmdUser=$U
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/sock
CredType=cred/munge
SlurmctldPort=$BASE
SrunPortRange=$((BASE+100))-$((BASE+400))
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/d_slurmd-%n.pid
SlurmdSpoolDir=$ROOT/spool-%n
StateSaveLocation=$ROOT/state
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((NMEM/NCPU))
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill,UsePss
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=${SLURM_KILLWAIT:-5}
MinJobAge=${SLURM_MINJOBAGE:-300}
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize=${SLURM_MAXARRAY:-1001}
SlurmdParameters=config_overrides
$acct
${lines}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=${SLURM_GRACE:-5} PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
C
  # slurmd loads a cgroup plugin even when nothing uses it; v1 needs no mounted cgroup filesystem, autodetect dies without one
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n' > "$ROOT/cgroup.conf"
  cat > "$ROOT/env.sh" <<C
export SLURM_CONF=$ROOT/slurm.conf SLURM_SANDBOX=$ROOT
C
  export SLURM_CONF=$ROOT/slurm.conf
  if [ "$ACCT" != none ]; then
    # the conf of slurmdbd is looked up beside slurm.conf
    setsid slurmdbd </dev/null >"$ROOT/log/slurmdbd.out" 2>&1 || die slurmdbd
    wait_for 30 slurmdbd sacctmgr -in show cluster
    sacctmgr -i add cluster sandbox >/dev/null 2>&1 || true
    sacctmgr -i add account test Description=test Organization=test >/dev/null 2>&1 || true
    sacctmgr -i add user "$U" account=test >/dev/null 2>&1 || true
  fi
  setsid slurmctld -c </dev/null >"$ROOT/log/slurmctld.out" 2>&1 || die slurmctld
  for i in "${names[@]}"; do setsid slurmd -N "$i" </dev/null >"$ROOT/log/slurmd-$i.out" 2>&1 || die "slurmd $i"; done
  wait_for 30 nodes bash -c "[ \"\$(sinfo -h -N -p main -t idle -o %N | wc -l)\" -eq $NODES ]"
  timeout 20 srun -Q -n1 true || die "srun self-test"       # also warms the slurmctld->slurmdbd agent (first record may lag seconds)
  [ "$ACCT" = none ] || wait_for 60 sacct bash -c 'sacct -n -X -o State | grep -q COMPLETED'
  say "up in $((SECONDS-t0))s; run: . $ROOT/env.sh"; }

case "${1:-up}" in install) install;; up) up;; down) down;; env) cat "$ROOT/env.sh";;
 status) . "$ROOT/env.sh"; sinfo; squeue; [ "$ACCT" = none ] || sacct -X -o JobID,JobName,State,ExitCode | tail -5;; *) echo "usage: $0 install|up|down|status|env" >&2; exit 2;; esac
