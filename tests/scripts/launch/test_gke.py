"""The JobSets: what they say, that YAML keeps it, and what reaches a container after Kubernetes has expanded it."""

import copy

import pytest
import yaml

from scripts.launch import gke
from scripts.launch.check_files import check_files
from sira_jax.errors import ConfigError
from tests.scripts.launch import launches


def expand(text, variables):
    """What Kubernetes makes of a command's word or a variable: $(NAME) is expanded if there is one, and $$ is $."""
    result, i = "", 0
    while i < len(text):
        if text.startswith("$$", i):
            result, i = result + "$", i + 2
        elif text.startswith("$(", i) and ")" in text[i:]:
            end = text.index(")", i)
            result += variables.get(text[i + 2 : end], text[i : end + 1])
            i = end + 1
        else:
            result, i = result + text[i], i + 1
    return result


def manifests(config):
    return list(yaml.safe_load_all(gke.render(config)["jobset.yaml"]))


def pod(manifest):
    [replicated] = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]


def test_a_slice_of_several_hosts():
    config = launches.launch(
        tpu={"generation": "v5p", "topology": "2x2x4", "slices": 2},
        job={"max_restarts": 7, "grace_seconds": 45},
        google={"namespace": "lab", "queue": "tpus", "priority": "high"},
    )
    [manifest] = manifests(config)
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    metadata = manifest["metadata"]
    assert (metadata["name"], metadata["namespace"]) == ("a-job", "lab")
    assert metadata["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    policy = manifest["spec"]["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (7, "BlockingRecreate")
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    # 16 chips, 4 a host.
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    spec = pod(manifest)["spec"]
    assert (spec["restartPolicy"], spec["terminationGracePeriodSeconds"]) == ("Never", 45)
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    assert spec["priorityClassName"] == "high"
    [container] = spec["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [
        "python",
        "scripts/train.py",
        "--config=a.py",
        "--workdir=/gcs/a-bucket/runs/a-job",
        "--stopped_status=75",
        "--multihost",
    ]


def test_a_bucket_is_mounted():
    [manifest] = manifests(launches.launch())
    template = pod(manifest)
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    [volume] = template["spec"]["volumes"]
    [mount] = template["spec"]["containers"][0]["volumeMounts"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "a-bucket"
    assert mount == {"name": volume["name"], "mountPath": "/gcs/a-bucket"}
    assert template["spec"]["serviceAccountName"] == "trainer"


def test_a_claim_is_mounted():
    config = launches.launch(job={"output": "/data/runs"}, google={"volume_claim": "nfs"})
    [manifest] = manifests(config)
    template = pod(manifest)
    assert template["metadata"]["annotations"] == {}
    assert template["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "nfs"}
    assert template["spec"]["containers"][0]["volumeMounts"][0]["mountPath"] == "/data/runs"


def test_spot_nodes():
    [manifest] = manifests(launches.launch(job={"spot": True}))
    spec = pod(manifest)["spec"]
    assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    [toleration] = spec["tolerations"]
    assert (toleration["key"], toleration["value"]) == ("cloud.google.com/gke-spot", "true")


@pytest.mark.parametrize(
    ("generation", "topology", "chips", "hosts"),
    [("v5e", "1x1", 1, 1), ("v5e", "2x4", 8, 1), ("v5e", "2x4", 4, 2), ("v6e", "16x16", 4, 64)],
)
def test_hosts(generation, topology, chips, hosts):
    tpu = {"generation": generation, "topology": topology}
    [manifest] = manifests(launches.launch(tpu=tpu, google={"chips_per_host": chips}))
    [replicated] = manifest["spec"]["replicatedJobs"]
    assert replicated["template"]["spec"]["parallelism"] == hosts
    command = pod(manifest)["spec"]["containers"][0]["command"]
    assert ("--multihost" in command) == (hosts > 1)


def test_a_sweep_is_a_jobset_each():
    config = launches.launch(job={"sweep": (("--rank=2",), ("--rank=4",))})
    both = manifests(config)
    assert [manifest["metadata"]["name"] for manifest in both] == ["a-job-0", "a-job-1"]
    for index, manifest in enumerate(both):
        command = pod(manifest)["spec"]["containers"][0]["command"]
        assert command[3:5] == [
            f"--rank={2 + 2 * index}",
            f"--workdir=/gcs/a-bucket/runs/a-job/{index:04d}",
        ]


def test_yaml_and_kubernetes_keep_every_value():
    env = {f"V{i}": value for i, value in enumerate(launches.HOSTILE)}
    env["HOME"] = "must not be put in"
    config = launches.launch(job={"command": ("train", *launches.HOSTILE), "env": env})
    files = gke.render(config)
    check_files(files)
    [manifest] = yaml.safe_load_all(files["jobset.yaml"])
    assert manifest == gke.jobset(config, 0)
    [container] = pod(manifest)["spec"]["containers"]
    words = [expand(word, env) for word in container["command"]]
    assert tuple(words[1 : 1 + len(launches.HOSTILE)]) == launches.HOSTILE
    assert {v["name"]: expand(v["value"], env) for v in container["env"]} == env


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"job": {"image": None}}, "job.image=None is not allowed: target gke needs it"),
        ({"job": {"output": None}}, "job.output=None is not allowed: target gke needs it"),
        ({"job": {"output": "/data"}}, "google.volume_claim=None is not allowed"),
        ({"google": {"service_account": None}}, "google.service_account=None is not allowed"),
        ({"google": {"chips_per_host": 8}}, "google.chips_per_host=8 is not allowed"),
        ({"tpu": {"topology": "1x1"}}, "google.chips_per_host=4 is not allowed"),
        (
            {"tpu": {"generation": "v4", "topology": "2x2x1"}, "google": {"chips_per_host": 1}},
            "google.chips_per_host=1 is not allowed",
        ),
    ],
)
def test_mistakes(sections, message):
    with pytest.raises(ConfigError) as error:
        gke.render(launches.launch(**sections))
    assert str(error.value).startswith(message)


def damage(manifest, path, value):
    manifest = copy.deepcopy(manifest)
    holder = manifest
    for key in path[:-1]:
        holder = holder[key]
    if value is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return manifest


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "Job"),
        (("metadata", "name"), "A_job"),
        (("metadata", "nmae"), "a-job"),
        (("spec", "failurePolicy", "maxRestarts"), "20"),
        (("spec", "failurePolicy", "rules", 0, "action"), "FailJob"),
        (("spec", "replicatedJobs"), []),
        ((*JOB, "parallelism"), 0),
        ((*JOB, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), [0]),
        ((*POD, "restartPolicy"), "OnFailure"),
        ((*POD, "terminationGracePeriodSeconds"), None),
        ((*POD, "containers", 0, "command", 1), True),
        ((*POD, "containers", 0, "resources", "limits"), {"nvidia.com/gpu": 1}),
        ((*POD, "nodeSelector", "cloud.google.com/gke-spot"), True),
    ],
)
def test_the_schema_finds_damage(path, value):
    good = gke.jobset(launches.launch(), 0)
    check_files({"jobset.yaml": yaml.safe_dump(good)})
    with pytest.raises(ConfigError, match=r"jobset\.yaml: data"):
        check_files({"jobset.yaml": yaml.safe_dump(damage(good, path, value))})


def test_broken_yaml_is_one_error():
    with pytest.raises(ConfigError, match=r"jobset\.yaml: .*mapping"):
        check_files({"jobset.yaml": "a: b: c"})
