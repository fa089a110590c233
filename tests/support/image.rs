//! A small root directory to boot from: busybox and the libraries it needs.

use crate::daemon::Daemon;
use crate::process::run;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes the image below the daemon's directory, once; `None` when there is no busybox.
pub fn small(daemon: &Daemon) -> Option<PathBuf> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let image = daemon.base.join("image");
    if image.exists() {
        return Some(image);
    }
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].into_iter().find(|path| Path::new(path).exists())?;
    let making = daemon.base.join("image.new");
    let mut command = Command::new("bash");
    command.args(["-euc", SCRIPT, "image"]).arg(&making).arg(busybox);
    run(command).ok();
    run({
        let mut command = Command::new("chown");
        command.args(["-hR", &format!("{}:{}", daemon.identity.uid, daemon.identity.gid)]).arg(&making);
        command
    })
    .ok();
    std::fs::rename(&making, &image).ok()?;
    Some(image)
}

const SCRIPT: &str = r#"
umask 022
mkdir -p "$1"/{bin,etc,proc,sys,dev,tmp,run,root,usr}
cp "$2" "$1/bin/busybox"
{ ldd "$2" || true; } | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$1$(dirname "$library")"
    cp "$library" "$1$library"
done
for applet in $("$2" --list); do
    [ "$applet" = busybox ] || ln -s busybox "$1/bin/$applet"
done
echo 'root:x:0:0:root:/root:/bin/sh' > "$1/etc/passwd"
echo 'root:x:0:' > "$1/etc/group"
"#;
