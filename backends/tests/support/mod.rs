//! What the tests of the container backend share: a stand-in for the agent that runs commands in the machine, a
//! backend with its state in a temporary directory, and a look at what is left over.

#![allow(dead_code)]

use machinefs_backends::container::{ContainerBackend, ContainerOptions};
use machinefs_backends::{Backend, MachineSpec};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Why the tests of machines cannot run here; `None`: they can.
pub fn missing() -> Option<String> {
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    ["crun", "cc"].into_iter().find(|p| !there(p)).map(|p| format!("{p} is not installed"))
}

/// Returns from the test, saying why, when it cannot run here.
#[macro_export]
macro_rules! need {
    (root) => {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        need!();
    };
    () => {
        if let Some(reason) = support::missing() {
            println!("skipped: {reason}");
            return;
        }
    };
}

/// A backend, and machines that are destroyed with it.
pub struct Rig {
    pub dir: tempfile::TempDir,
    pub agent: PathBuf,
    pub backend: ContainerBackend,
    specs: std::sync::Mutex<Vec<MachineSpec>>,
}

/// Tests run at the same time, in one process or several: their machines' numbers must differ; and those of daemons that
/// other tests start begin with 0.
fn slot() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    (1 + std::process::id() % 63) * 256 + NEXT.fetch_add(1, Ordering::Relaxed) % 256
}

impl Rig {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("mfs-test-").tempdir().unwrap();
        let agent = dir.path().join("agent");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/agent.c");
        let given = std::env::var_os("MACHINEFS_TEST_STANDIN").map(PathBuf::from);
        match given {
            Some(built) => drop(fs::copy(built, &agent).unwrap()),
            None => build_agent(&source, &agent),
        }
        let backend = Self::open(dir.path(), &agent);
        Self { dir, agent, backend, specs: Vec::new().into() }
    }

    pub fn open(dir: &Path, agent: &Path) -> ContainerBackend {
        let options = ContainerOptions::new(agent.to_owned(), dir.join("state"));
        ContainerBackend::new(ContainerOptions { resolv_conf: dir.join("resolv.conf"), ..options }).unwrap()
    }

    /// A backend that knows nothing but what is on disk, as after a restart of the daemon.
    pub fn reopened(&self) -> ContainerBackend {
        Self::open(self.dir.path(), &self.agent)
    }

    pub fn spec(&self, image: &str) -> MachineSpec {
        let slot = slot();
        let id = format!("m{slot}");
        let dir = self.dir.path().join("machines").join(&id);
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let spec = MachineSpec {
            id,
            dir,
            image: image.into(),
            cpus: None,
            memory: None,
            pids: None,
            hostname: "testhost".into(),
            uid_slot: slot,
            network: machinefs_backends::Network::None,
            disk: None,
            owner: machinefs_backends::Owner::default(),
            mounts: Vec::new(),
            from: None,
            resume: false,
            kernel: None,
            kernel_args: None,
        };
        self.specs.lock().unwrap().push(spec.clone());
        spec
    }

    pub async fn boot(&self, spec: &MachineSpec) -> machinefs_backends::Running {
        self.backend.create(spec, std::sync::Arc::new(|_| {})).await.unwrap();
        self.backend.start(spec).await.unwrap()
    }

    /// Runs a command in the machine: its output and exit code.
    pub async fn run(&self, spec: &MachineSpec, command: &str) -> (String, i32) {
        let mut stream = self.backend.connect(spec).await.unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream.write_all(command.as_bytes()).unwrap();
        stream.write_all(&[0]).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.iter().rposition(|b| *b == 0).expect("an exit code");
        let code = String::from_utf8_lossy(&answer[end + 1..]).parse().unwrap();
        (String::from_utf8_lossy(&answer[..end]).into_owned(), code)
    }

    /// Runs a command that must succeed.
    pub async fn ok(&self, spec: &MachineSpec, command: &str) -> String {
        let (output, code) = self.run(spec, command).await;
        assert_eq!(code, 0, "`{command}` in the machine: {output}");
        output
    }

    /// Destroys all machines and shows that nothing of them is left.
    pub async fn finish(self) {
        let specs = self.specs.lock().unwrap().clone();
        for spec in &specs {
            self.backend.destroy(spec).await.unwrap();
        }
        for spec in &specs {
            assert_eq!(leftovers(spec), Vec::<String>::new(), "after the destroy of {}", spec.id);
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // After a failed assertion: take the machines down all the same.
        let specs = self.specs.lock().map(|s| s.clone()).unwrap_or_default();
        let backend = self.backend.clone();
        let end = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            specs.iter().for_each(|s| drop(runtime.block_on(backend.destroy(s))));
        };
        drop(std::thread::spawn(end).join());
    }
}

pub fn build_agent(source: &Path, to: &Path) {
    let output = Command::new("cc").args(["-static", "-O1", "-w", "-o"]).arg(to).arg(source).output().unwrap();
    assert!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
}

/// Every trace of a machine on this host.
pub fn leftovers(spec: &MachineSpec) -> Vec<String> {
    let mut found = Vec::new();
    let dir = spec.dir.display().to_string();
    for entry in fs::read_dir(&spec.dir).into_iter().flatten() {
        found.push(format!("file {}", entry.unwrap().path().display()));
    }
    let interface = format!("{:04x}", spec.uid_slot);
    for line in fs::read_to_string("/proc/self/net/dev").unwrap().lines() {
        let name = line.split(':').next().unwrap_or_default().trim();
        if name.starts_with("mfs") && name.ends_with(&interface) {
            found.push(format!("interface {name}"));
        }
    }
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let text = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if text.starts_with(&format!("{dir}/")) {
            found.push(format!("loop device {}", entry.path().display()));
        }
    }
    let suffix = format!("-{}", spec.id);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    for line in mounts.lines() {
        if line.contains(&dir) || line.contains("/machinefs/rootfs") {
            found.push(format!("mount {line}"));
        }
        let mut fields = line.split(' ').skip(1);
        if let (Some(at), Some("cgroup" | "cgroup2")) = (fields.next(), fields.next()) {
            for entry in fs::read_dir(Path::new(at).join("machinefs")).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().ends_with(&suffix) {
                    found.push(format!("cgroup {}", entry.path().display()));
                }
            }
        }
    }
    // What a machine of root's is known by is its range of users; what an ordinary user has in a pid namespace of its
    // own is a machine.
    let base = (1_u32 << 30) + spec.uid_slot * 65536;
    let own = rustix::process::geteuid();
    for pid in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(status) = fs::read_to_string(pid.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim();
        let uid = field("Uid:").split_whitespace().next().and_then(|n| n.parse::<u32>().ok());
        let of_user = !own.is_root() && uid == Some(own.as_raw()) && field("NSpid:").split_whitespace().count() > 1;
        let of_root = uid.is_some_and(|u| (base..base + 65536).contains(&u));
        if !field("State:").starts_with('Z') && (of_user || of_root) {
            found.push(format!("process {} {}", pid.path().display(), field("Name:")));
        }
    }
    found
}

/// Waits until something is so.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// For a closure of a test that is not async.
pub fn futures_block<T>(future: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(future))
}

/// The daemon that dies: runs machines until it is killed. Told what to do by [`kill_victims`].
pub async fn victim() {
    let (Ok(dir), Ok(spec)) = (std::env::var("MFS_VICTIM_DIR"), std::env::var("MFS_VICTIM_SPEC")) else { return };
    let dir = Path::new(&dir);
    let spec: MachineSpec = serde_json::from_str(&spec).unwrap();
    let backend = Rig::open(dir, &dir.join("agent"));
    for round in 0.. {
        backend.create(&spec, std::sync::Arc::new(|_| {})).await.unwrap();
        backend.start(&spec).await.unwrap();
        if round % 2 == 0 {
            backend.kill(&spec).await.unwrap();
        }
        backend.destroy(&spec).await.unwrap();
    }
}

/// Kills a daemon in each step of create, start, kill and destroy, and shows that the next one clears up all of it.
pub async fn kill_victims(rig: &Rig, rounds: u64, adjust: impl Fn(&mut MachineSpec)) {
    // Not `host`, which every new daemon looks at for a while before it does anything.
    let image = rig.dir.path().join("image");
    fs::create_dir(&image).unwrap();
    fs::create_dir(image.join("etc")).unwrap();
    let mut steps = BTreeMap::<&str, u32>::new();
    for round in 0..rounds {
        let mut spec = rig.spec(image.to_str().unwrap());
        adjust(&mut spec);
        let spec = spec;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["victim", "--exact", "--ignored", "--nocapture"])
            .env("MFS_VICTIM_DIR", rig.dir.path())
            .env("MFS_VICTIM_SPEC", serde_json::to_string(&spec).unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("its first start", || spec.dir.join("lock").exists());
        std::thread::sleep(Duration::from_millis(180 * round / rounds));
        assert!(child.try_wait().unwrap().is_none(), "the daemon ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        let there = |name: &str| spec.dir.join(name).exists();
        let step = match () {
            () if there("run.json") => "running",
            () if there("agent.sock") => "starting",
            () if there("bundle") => "stopped or starting",
            () if there("root.json") => "created",
            () if there("upper") || there("upper.part") => "creating or destroying",
            () => "before or after",
        };
        *steps.entry(step).or_default() += 1;
        let fresh = rig.reopened();
        if round % 2 == 0 {
            fresh.adopt(&spec).await.unwrap();
        }
        fresh.destroy(&spec).await.unwrap();
        assert_eq!(leftovers(&spec), Vec::<String>::new(), "round {round}, {step}");
    }
    println!("killed while it was: {steps:?}");
}
