//! Facts in text and JSON: `info`, `index`. Numbers that change by themselves are fixed-width, so that
//! a size asked for before a read is right at the read.

use super::Machine;
use super::events::stamp;
use super::registry::Registry;
use super::state::State;
use super::vars::VarKind;
use serde_json::{Map, Value, json};
use std::fmt::Write;

impl Machine {
    pub(super) fn uptime_secs(&self) -> u64 {
        let started = self.run.lock().started;
        match (self.state(), started) {
            (State::Running | State::Paused, Some(started)) => started.elapsed().map_or(0, |time| time.as_secs()),
            _ => 0,
        }
    }

    /// The facts, as ordered pairs of key and value.
    fn facts(&self) -> Vec<(String, String)> {
        let config = self.config.lock().0.clone();
        let backend = self.backend();
        let state = self.state();
        let is_down = matches!(state, State::Stopped | State::Failed | State::Lost | State::Creating);
        let mut facts: Vec<(String, String)> = Vec::new();
        let mut add = |key: &str, value: String| facts.push((key.to_string(), value));
        add("id", self.id.clone());
        add("name", self.name());
        add("state", state.to_string());
        add("idle", if self.is_idle() { "yes" } else { "no" }.to_string());
        add("uid", self.owner.0.to_string());
        add("gid", self.owner.1.to_string());
        add("created", stamp(self.created));
        add("backend", backend.name().to_string());
        add("isolation", backend.isolation().to_string());
        add("template", self.template().to_string());
        add("image", config.get("image").unwrap_or("host").to_string());
        add("uptime", format!("{:010}", self.uptime_secs()));
        let run = self.run.lock();
        add("pid", run.pid.to_string());
        if let Some(started) = run.started {
            add("started", stamp(started));
        }
        for (key, value) in &run.facts {
            add(key, value.clone());
        }
        for warning in &run.warnings {
            add("warning", warning.clone());
        }
        if let Some(guest) = &*self.guest.read() {
            add("agent", guest.info.version.clone());
            add("hostname", guest.info.hostname.clone());
            add("kernel", guest.info.kernel.clone());
            add("os", guest.info.os.clone());
            for address in &guest.info.addresses {
                add("address", address.clone());
            }
        }
        for (id, name) in self.vars.list(VarKind::Tag) {
            let value = self.vars.value(VarKind::Tag, id).unwrap_or_default();
            add("tag", format!("{name} {}", String::from_utf8_lossy(&value)));
        }
        if let Some(running) = run.config.as_ref().filter(|_| !is_down) {
            for key in super::config::KEYS {
                let waits = key.applies == super::config::Applies::NextStart;
                let (now, next) = (running.get(key.name), config.get(key.name));
                if waits && now != next {
                    add("pending", format!("{} {}", key.name, next.unwrap_or_default()));
                }
            }
        }
        // What the guest says of itself must not look like a line of ours.
        for (_, value) in &mut facts {
            if value.chars().any(char::is_control) {
                *value = value.escape_default().to_string();
            }
        }
        facts
    }

    /// Facts, one line each: key, space, value.
    pub fn info_text(&self) -> String {
        self.facts().into_iter().fold(String::new(), |mut text, (key, value)| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{key} {value}");
            text
        })
    }

    /// The same as one JSON object; a key that comes more than once is a list.
    pub fn info_json(&self) -> String {
        let mut object = Map::new();
        let mut padding = 0;
        for (key, value) in self.facts() {
            let repeated = matches!(key.as_str(), "warning" | "address" | "pending" | "tag");
            let value = json_value(&key, value, &mut padding);
            if repeated {
                if let Value::Array(list) = object.entry(key).or_insert_with(|| json!([])) {
                    list.push(value);
                }
            } else {
                object.insert(key, value);
            }
        }
        json_text(Value::Object(object), padding)
    }

    /// Its line of `index`, by column.
    fn index_row(&self) -> [String; 9] {
        let config = self.config.lock().0.clone();
        let text = |key: &str| config.get(key).unwrap_or("-").to_string();
        [
            self.name(),
            self.state().to_string(),
            self.backend().name().to_string(),
            self.backend().isolation().to_string(),
            super::events::quote(&text("image")),
            text("cpus"),
            text("memory"),
            format!("{:010}", self.uptime_secs()),
            self.owner.0.to_string(),
        ]
    }
}

/// A fact as JSON has it. Numbers lose their leading zeros; how many is added to `padding`.
fn json_value(key: &str, value: String, padding: &mut usize) -> Value {
    let number = matches!(key, "uid" | "gid" | "owner" | "pid" | "uptime").then(|| value.parse::<u64>().ok()).flatten();
    let Some(number) = number else { return Value::String(value) };
    *padding += value.len().saturating_sub(number.to_string().len());
    number.into()
}

/// The text of a JSON file, as long as if its numbers had their leading zeros.
fn json_text(value: Value, padding: usize) -> String {
    format!("{value}{:padding$}\n", "")
}

const COLUMNS: [&str; 9] = ["name", "state", "backend", "isolation", "image", "cpus", "memory", "uptime", "owner"];

impl Registry {
    /// One line a machine; the columns are those of [`COLUMNS`], separated by one space.
    pub fn index_text(&self) -> String {
        self.list().iter().fold(String::new(), |mut text, machine| {
            let _ = writeln!(text, "{}", machine.index_row().join(" "));
            text
        })
    }

    /// The same as a JSON list of objects.
    pub fn index_json(&self) -> String {
        let mut padding = 0;
        let mut rows: Vec<Value> = Vec::new();
        for machine in self.list() {
            let row = COLUMNS.into_iter().zip(machine.index_row());
            let row = row.map(|(column, value)| (column.to_string(), json_value(column, value, &mut padding)));
            rows.push(Value::Object(row.collect()));
        }
        json_text(Value::Array(rows), padding)
    }
}
