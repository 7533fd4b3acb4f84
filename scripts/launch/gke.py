"""GKE: a JobSet a run, each slice one of its jobs, each host one pod.

Sources: the JobSet API v1alpha2 (sigs.k8s.io/jobset), pod failure policies of Kubernetes, and GKE's pages on TPUs (node
labels), Spot VMs and the Cloud Storage FUSE CSI driver. JAX finds the processes of a slice in the variables that GKE sets
(jax/_src/clusters/cloud_tpu_cluster.py).
"""

from typing import Any

import yaml

from scripts.launch.command import (
    MISTAKE_STATUS,
    assign,
    command,
    kubernetes_literal,
)
from scripts.launch.config import LaunchConfig
from scripts.launch.script import RENDERED, script
from scripts.launch.values import need
from sira_jax.errors import check

_VOLUME = "output"


def render(config: LaunchConfig) -> dict[str, str]:
    """The files by name.

    Raises:
      ConfigError: a field that GKE needs is not set, or contradicts another.
    """
    need(config.job.output, "job.output", "gke")
    manifests = [jobset(config, index) for index in range(len(config.job.points))]
    text = f"# {RENDERED}\n" + yaml.safe_dump_all(manifests, sort_keys=False, width=1000)
    submit = script(
        "set -euo pipefail",
        'cd -- "$(dirname -- "${BASH_SOURCE[0]}")"',
        assign("NAMESPACE", config.google.namespace),
        'exec kubectl apply --namespace="$NAMESPACE" --filename=jobset.yaml',
    )
    return {"jobset.yaml": text, "submit.sh": submit}


def jobset(config: LaunchConfig, index: int) -> dict[str, Any]:
    """The JobSet of run `index` of the sweep, as plain data."""
    job, google, tpu = config.job, config.google, config.tpu
    hosts = _hosts(config)
    metadata: dict[str, Any] = {
        "name": job.point_name(index),
        "namespace": google.namespace,
        "annotations": {
            # One slice takes one node pool whole: its hosts must be wired to each other.
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    if google.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": google.queue}
    mistake = {"operator": "In", "values": [MISTAKE_STATUS]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                # The old pods end before new ones start: two runs must not write one directory.
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": tpu.slices,
                    "template": {
                        "spec": {
                            "parallelism": hosts,
                            "completions": hosts,
                            "completionMode": "Indexed",
                            # A lost pod fails its job, and so restarts the JobSet: the others cannot go on without it.
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [{"action": "FailJob", "onExitCodes": mistake}]
                            },
                            "template": _pod(config, index, hosts),
                        }
                    },
                }
            ],
        },
    }


def _hosts(config: LaunchConfig) -> int:
    tpu, chips = config.tpu, config.google.chips_per_host
    sizes = tpu.kind.host_sizes
    check(
        chips in sizes and tpu.chips % chips == 0 and (chips == 4 or tpu.chips == chips),
        "google.chips_per_host",
        chips,
        f"one of {sizes} for {tpu.generation}; a host of 1 or 8 is a slice of its own,"
        f" and tpu.topology={tpu.topology} has {tpu.chips} chips",
    )
    return tpu.chips // chips


def _pod(config: LaunchConfig, index: int, hosts: int) -> dict[str, Any]:
    job, google, tpu = config.job, config.google, config.tpu
    arguments = command(job, index, hosts * tpu.slices)
    chips = {"google.com/tpu": google.chips_per_host}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu.kind.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.topology,
    }
    spec: dict[str, Any] = {
        # Never: exit statuses are the pod failure policy's, which needs it.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector,
        "containers": [
            {
                "name": "train",
                "image": need(job.image, "job.image", "gke"),
                # No shell in between, so that the training is the process that gets SIGTERM.
                "command": [kubernetes_literal(argument) for argument in arguments],
                "env": [
                    {"name": name, "value": kubernetes_literal(value)}
                    for name, value in job.env.items()
                ],
                "ports": [{"containerPort": 8471}, {"containerPort": 8476}],
                "resources": {"requests": dict(chips), "limits": dict(chips)},
                "volumeMounts": [{"name": _VOLUME, "mountPath": _mount_path(config)}],
            }
        ],
        "volumes": [_volume(config)],
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spec["tolerations"] = [
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        ]
    if google.service_account is not None:
        spec["serviceAccountName"] = google.service_account
    if google.priority is not None:
        spec["priorityClassName"] = google.priority
    annotations = {"gke-gcsfuse/volumes": "true"} if job.bucket else {}
    return {"metadata": {"annotations": annotations}, "spec": spec}


def _mount_path(config: LaunchConfig) -> str:
    bucket = config.job.bucket
    return f"/gcs/{bucket}" if bucket else config.job.directory


def _volume(config: LaunchConfig) -> dict[str, Any]:
    bucket = config.job.bucket
    if bucket:
        need(config.google.service_account, "google.service_account", "gke with a gs:// output")
        attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        return {"name": _VOLUME, "csi": csi}
    claim = need(config.google.volume_claim, "google.volume_claim", "gke with a path as output")
    return {"name": _VOLUME, "persistentVolumeClaim": {"claimName": claim}}
