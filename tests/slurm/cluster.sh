#!/usr/bin/env bash
# Starts a real two-node Slurm cluster on this machine, runs a command, and removes the cluster. Needs root and the packages
# slurmctld, slurmd, slurm-client, munge and iproute2.
#
#   tests/slurm/cluster.sh FOLDER COMMAND...
#
# Every node has its own network and host name (node1, node2, at 10.77.0.11 and .12; the command runs on "login", at
# 10.77.0.1) and claims 64 cores and 8 GPUs, which are dummy devices. Everything runs in namespaces and ends with their
# first process. FOLDER holds configuration, state and logs; munge requires that everybody can reach it.
set -euo pipefail
FOLDER=$1
shift

if [[ -z ${CLUSTER_INSIDE:-} ]]; then
    export CLUSTER_INSIDE=1
    # unshare ignores SIGTERM; its child dies with it.
    unshare --net --mount --uts --pid --fork --kill-child --mount-proc "$0" "$FOLDER" "$@" &
    inside=$!
    trap 'kill -KILL $inside' TERM INT HUP
    code=0
    wait "$inside" || code=$?
    exit "$code"
fi
unset CLUSTER_INSIDE

# ---- configuration
NODES="node1 node2"
mkdir -p "$FOLDER"/{etc,state,spool,log,munge,dev}
chmod 755 "$FOLDER" "$FOLDER"/*
for i in {0..7}; do mknod -m 666 "$FOLDER/dev/nvidia$i" c 1 3; done # major 1, minor 3: /dev/null
echo "Name=gpu File=$FOLDER/dev/nvidia[0-7]" >"$FOLDER/etc/gres.conf"
cat >"$FOLDER/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=5
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool/%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
KillWait=5
ReturnToService=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node1 NodeHostname=node1 NodeAddr=10.77.0.11 CPUs=64 RealMemory=1000000 Gres=gpu:8
NodeName=node2 NodeHostname=node2 NodeAddr=10.77.0.12 CPUs=64 RealMemory=1000000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
printf '%s\n' "127.0.0.1 localhost" "10.77.0.1 login" "10.77.0.11 node1" "10.77.0.12 node2" >"$FOLDER/etc/hosts"
(umask 077 && head -c 1024 /dev/urandom >"$FOLDER/munge/key")
mkdir -p /etc/slurm
mount --bind "$FOLDER/etc" /etc/slurm # in these namespaces only
mount --bind "$FOLDER/etc/hosts" /etc/hosts

# ---- network: a bridge with a link to each node
hostname login
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up

# ---- daemons
munged --foreground --key-file="$FOLDER/munge/key" --socket="$FOLDER/munge/socket" --pid-file="$FOLDER/munge/pid" \
    --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/munge/seed" &>"$FOLDER/log/munged.out" &
until [[ -S $FOLDER/munge/socket ]] || ! kill -0 $! 2>/dev/null; do sleep 0.05; done
setsid slurmctld -D &>/dev/null &
number=0
for node in $NODES; do
    number=$((number + 1))
    unshare --net --uts bash -c "
        hostname $node
        until ip link show eth0 &>/dev/null; do sleep 0.05; done
        ip link set lo up; ip addr add 10.77.0.1$number/24 dev eth0; ip link set eth0 up
        exec slurmd -D -N $node" &>"$FOLDER/log/$node.out" &
    until [[ $(readlink "/proc/$!/ns/net") != "$(readlink /proc/self/ns/net)" ]]; do sleep 0.05; done
    ip link add "port$number" type veth peer name cable
    ip link set "port$number" master br0 up
    ip link set cable netns "$!" name eth0
done
for _ in {1..1200}; do
    [[ $(timeout 3 sinfo -h -t idle -o %D 2>/dev/null) == 2 ]] && break
    sleep 0.1
done
[[ $(timeout 3 sinfo -h -t idle -o %D) == 2 ]] || { echo "cluster.sh: the nodes did not start within 2 minutes; see the logs in $FOLDER/log" >&2; exit 97; }

"$@"
