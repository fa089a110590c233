//! An outside world for machines with a network, of network namespaces: the host that the daemon believes to be on, the
//! internet behind its gateway, and a neighbour. Nothing of it touches the network of the host that the test runs on.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// On the internet: a web server.
pub const INTERNET: &str = "203.0.113.10";
/// The gateway, in the host's own network.
pub const GATEWAY: &str = "198.51.100.2";
/// The host's addresses: towards the gateway, and towards its neighbour.
pub const HOST: [&str; 2] = ["198.51.100.1", "192.168.77.1"];
/// A neighbour in a private network of the host's.
pub const NEIGHBOUR: &str = "192.168.77.2";
/// Behind the gateway, and closed: a private network, a cloud's metadata service, a carrier's network.
pub const CLOSED: [&str; 3] = ["10.99.0.1", "169.254.169.254", "100.64.9.9"];
/// The host's name server, which is closed but for names.
pub const NAMES: &str = "10.99.0.53";

pub struct Outside {
    names: Vec<String>,
    servers: Vec<Child>,
}

fn run(command: &str) {
    let status = Command::new("sh").args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin; {command}")]).status().unwrap();
    assert!(status.success(), "{command}");
}

impl Outside {
    pub fn missing() -> Option<String> {
        let there = |p: &&str| {
            let text = format!("PATH=$PATH:/usr/sbin:/sbin command -v {p}");
            !Command::new("sh").args(["-c", &text]).stdout(Stdio::null()).status().is_ok_and(|s| s.success())
        };
        ["ip", "nft", "python3", "nsenter"].iter().find(|p| there(p)).map(|p| format!("{p} is not installed"))
    }

    pub fn new() -> Self {
        let id = std::process::id();
        let names: Vec<String> = ["host", "net", "near"].iter().map(|n| format!("mfstest{n}{id}")).collect();
        let mut world = Self { names, servers: Vec::new() };
        for name in &world.names {
            run(&format!("ip netns add {name} && ip -n {name} link set lo up"));
        }
        let [host, net, near] = [0, 1, 2].map(|n| world.names[n].clone());
        let [own, private] = HOST;
        run(&format!(
            "ip -n {host} link add up0 type veth peer name down0 netns {net} &&
             ip -n {host} link add lan0 type veth peer name lan0 netns {near} &&
             ip -n {host} addr add {own}/24 dev up0 && ip -n {host} link set up0 up &&
             ip -n {net} addr add {GATEWAY}/24 dev down0 && ip -n {net} link set down0 up &&
             ip -n {host} route add default via {GATEWAY} &&
             ip -n {host} addr add {private}/24 dev lan0 && ip -n {host} link set lan0 up &&
             ip -n {near} addr add {NEIGHBOUR}/24 dev lan0 && ip -n {near} link set lan0 up &&
             ip -n {near} route add default via {private}"
        ));
        for address in CLOSED.iter().chain(&[INTERNET, NAMES]) {
            run(&format!("ip -n {net} addr add {address}/32 dev lo"));
        }
        for (name, ports) in [(&net, "80 53"), (&near, "80"), (&host, "80")] {
            let server = world.server(name, ports);
            world.servers.push(server);
        }
        world
    }

    fn server(&self, name: &str, ports: &str) -> Child {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/outside.py");
        let label = name.trim_start_matches("mfstest").trim_end_matches(char::is_numeric);
        let mut child = self
            .command(name, "python3")
            .arg(script)
            .arg(label)
            .args(ports.split(' '))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        child
    }

    /// A program in one of the namespaces: of the network alone, unlike with `ip netns exec`.
    fn command(&self, name: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{name}")).arg("--").arg(program);
        command
    }

    /// A program on the host of this world.
    pub fn on_host(&self, program: &str) -> Command {
        self.command(&self.names[0], program)
    }

    pub fn neighbour(&self) -> &str {
        &self.names[2]
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for server in &mut self.servers {
            drop(server.kill());
            drop(server.wait());
        }
        for name in &self.names {
            run(&format!("ip netns del {name}"));
        }
    }
}
