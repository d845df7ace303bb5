//! What the documents say that a test can hold true.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

fn files(under: &Path, ending: &str, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(under)? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            files(&path, ending, found)?;
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
    Ok(())
}

/// Names of tests are sentences: four words at least.
fn is_a_test(word: &str) -> bool {
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    word.matches('_').count() >= 4 && word.chars().all(letter) && !is_a_metric(word)
}

fn is_a_metric(word: &str) -> bool {
    word.starts_with("reap_")
}

/// Names of metrics in `docs/OPERATIONS.md`: without their labels, and each that braces in the middle stand for.
pub(super) fn metrics() -> Result<BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/OPERATIONS.md"))?;
    let mut names = BTreeSet::new();
    for word in text.split('`').skip(1).step_by(2).filter(|word| is_a_metric(word)) {
        let (name, rest) = word.split_once('{').unwrap_or((word, "}"));
        let (choices, end) = rest.split_once('}').context("a brace that is open")?;
        match end {
            "" => drop(names.insert(name.to_owned())),
            _ => names.extend(choices.split(',').map(|choice| format!("{name}{choice}{end}"))),
        }
    }
    Ok(names)
}

#[test]
fn the_tests_that_the_documents_name_are_there() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (mut documents, mut sources) = (Vec::new(), Vec::new());
    files(&root.join("docs"), ".md", &mut documents)?;
    for room in ["store", "fs", "prefetcher", "tools", "tests"] {
        files(&root.join(room), ".rs", &mut sources)?;
    }
    let mut code = String::new();
    for source in sources {
        code.push_str(&std::fs::read_to_string(source)?);
    }
    let mut named = BTreeSet::new();
    for document in documents {
        let text = std::fs::read_to_string(document)?;
        let words = text.split('`').skip(1).step_by(2);
        named.extend(words.filter(|word| is_a_test(word)).map(str::to_owned));
    }
    ensure!(named.len() > 30, "only {} tests are named", named.len());
    let missing: Vec<_> =
        named.iter().filter(|name| !code.contains(&format!("fn {name}("))).collect();
    ensure!(missing.is_empty(), "there is no {missing:?}");
    Ok(())
}
