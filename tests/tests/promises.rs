//! `docs/SEMANTICS.md` names tests that are there.

use std::path::Path;

/// `FILE::TEST` and `FILE` in backquotes, in the last column of the tables: files below `tests/tests/`.
#[test]
fn each_names_a_test() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(top.join("docs/SEMANTICS.md")).expect("the page");
    let mut missing = Vec::new();
    let mut count = 0;
    for line in text.lines().filter(|line| line.starts_with('|') && !line.starts_with("|---")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
        let Some(last) = cells.last().filter(|last| last.contains('`')) else { continue };
        let mut quoted = last.split('`').skip(1).step_by(2);
        let mut source = None;
        for name in quoted.by_ref() {
            count += 1;
            let (file, test) = match name.split_once("::") {
                Some((file, test)) => (top.join("tests/tests").join(file).with_extension("rs"), Some(test)),
                // A path, whose tests are the names that follow it.
                None if name.contains('/') => {
                    let path = top.join(name);
                    source = Some(path.clone());
                    if name.contains('*') {
                        continue;
                    }
                    (path, None)
                }
                None => match &source {
                    Some(path) => (path.clone(), Some(name)),
                    None => (top.join("tests/tests").join(name).with_extension("rs"), None),
                },
            };
            let there = std::fs::read_to_string(&file)
                .is_ok_and(|code| test.is_none_or(|test| code.contains(&format!("fn {test}("))));
            if !there {
                missing.push(name.to_string());
            }
        }
    }
    assert!(count > 50, "{count} tests are named");
    assert!(missing.is_empty(), "these are not there: {missing:?}");
}
