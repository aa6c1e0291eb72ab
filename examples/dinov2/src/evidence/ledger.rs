//! The results file: one line of JSON for each finished run, written as soon as the run ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::EvidenceError;
use super::outcome::Outcome;
use super::plan::Run;
use super::protocol::{Conditions, Protocol};

/// A results file that is open for writing. Its first line states the conditions of the protocol, and every other line is
/// an [`Outcome`].
///
/// The file only grows. Each line is handed to the disk before the next run starts, so whoever is killed loses at most the
/// run that was under way. While a ledger is open, the file is locked against other writers.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    length: u64,
    protocol: String,
    outcomes: Vec<Outcome>,
}

/// What a results file holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// The name of the protocol.
    pub name: String,
    pub conditions: Conditions,
    pub outcomes: Vec<Outcome>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    name: String,
    protocol: String,
    conditions: Conditions,
}

impl Ledger {
    /// Opens a results file, or starts one.
    ///
    /// If the last line was cut off by a kill, it is removed, and its run will be due again.
    ///
    /// # Errors
    ///
    /// - The file cannot be read or written, or another process appends to it.
    /// - It belongs to a protocol with other conditions; the message names those that differ.
    /// - A line is not an outcome, or is one for the second time; the message names the line.
    pub fn open(path: &Path, protocol: &Protocol) -> Result<Self, EvidenceError> {
        let broken = |source| EvidenceError::File {
            path: path.to_path_buf(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(broken)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => EvidenceError::InUse {
                path: path.to_path_buf(),
            },
            TryLockError::Error(source) => broken(source),
        })?;
        let mut content = Vec::new();
        file.read_to_end(&mut content).map_err(broken)?;

        let header = protocol.header();
        let mut ledger = Self {
            path: path.to_path_buf(),
            file,
            length: 0,
            protocol: header.protocol.clone(),
            outcomes: Vec::new(),
        };
        let head = line(&header).map_err(broken)?;
        // A first line that was cut off; no other file begins like this.
        if head.as_bytes().starts_with(&content) {
            ledger.cut(0).map_err(broken)?;
            ledger.write(&head).map_err(broken)?;
            return Ok(ledger);
        }
        let (results, complete) = parse(path, &content)?;
        let found = results.conditions.identity(&results.name);
        if found != header.protocol {
            return Err(EvidenceError::OtherProtocol {
                path: path.to_path_buf(),
                found,
                wanted: header.protocol,
                differences: Conditions::differences(&results.conditions, &protocol.conditions),
            });
        }
        ledger.outcomes = results.outcomes;
        ledger.cut(complete as u64).map_err(broken)?;
        if !content[..complete].ends_with(b"\n") {
            ledger.write("\n").map_err(broken)?;
        }
        Ok(ledger)
    }

    /// All outcomes so far, in the order in which the runs ended.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// Adds an outcome and waits until it is on the disk.
    ///
    /// # Errors
    ///
    /// - The outcome belongs to another protocol, its run is in the file already, or it contradicts itself.
    /// - The file cannot be written. It then holds what it held before.
    pub fn append(&mut self, outcome: Outcome) -> Result<(), EvidenceError> {
        let refusal = match outcome.contradiction() {
            Some(reason) => Some(reason.to_string()),
            None if outcome.protocol != self.protocol => {
                Some(format!("it belongs to protocol {}", outcome.protocol))
            }
            None => find(&self.outcomes, &outcome.run).map(|_| "it is there already".to_string()),
        };
        if let Some(reason) = refusal {
            return Err(EvidenceError::Outcome {
                path: self.path.clone(),
                run: Box::new(outcome.run),
                reason,
            });
        }
        let length = self.length;
        let written = line(&outcome).and_then(|line| self.write(&line));
        if let Err(source) = written {
            // Half a line, from a disk that is full, must not stay in front of the next one.
            self.cut(length).ok();
            return Err(EvidenceError::File {
                path: self.path.clone(),
                source,
            });
        }
        self.outcomes.push(outcome);
        Ok(())
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        self.file.write_all(text.as_bytes())?;
        self.file.sync_data()?;
        self.length += text.len() as u64;
        Ok(())
    }

    /// Shortens the file and continues at its end.
    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.file.set_len(length)?;
        self.file.seek(SeekFrom::Start(length))?;
        self.length = length;
        Ok(())
    }
}

impl Results {
    /// Reads a results file, also while a comparison appends to it. A last line that is cut off is left out.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or a line is not an outcome or is one for the second time.
    pub fn read(path: &Path) -> Result<Self, EvidenceError> {
        let content = std::fs::read(path).map_err(|source| EvidenceError::File {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(parse(path, &content)?.0)
    }
}

impl Protocol {
    fn header(&self) -> Header {
        Header {
            name: self.name.clone(),
            protocol: self.identity(),
            conditions: self.conditions.clone(),
        }
    }
}

/// The results, and how many bytes they fill. The rest is a line that was cut off, maybe within a character.
fn parse(path: &Path, content: &[u8]) -> Result<(Results, usize), EvidenceError> {
    let wrong = |line: usize, reason: String| EvidenceError::Line {
        path: path.to_path_buf(),
        line,
        reason,
    };
    let mut lines = content.split_inclusive(|&byte| byte == b'\n').zip(1..);
    let first = lines.next().map_or(&[][..], |(first, _)| first);
    let header: Header = serde_json::from_slice(first)
        .map_err(|error| wrong(1, format!("it is not the head of a results file: {error}")))?;
    if header.conditions.identity(&header.name) != header.protocol {
        let reason = format!(
            "the conditions are not those of protocol {}",
            header.protocol
        );
        return Err(wrong(1, reason));
    }

    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut complete = first.len();
    for (content, number) in lines {
        let outcome: Outcome = match serde_json::from_slice(content) {
            Ok(outcome) => outcome,
            // The start of an object never is an object, so this is no outcome that misses nothing but its line end.
            Err(_) if !content.ends_with(b"\n") => break,
            Err(error) => return Err(wrong(number, format!("it is not a result: {error}"))),
        };
        if outcome.protocol != header.protocol {
            let reason = format!("it belongs to protocol {}", outcome.protocol);
            return Err(wrong(number, reason));
        }
        if let Some(reason) = outcome.contradiction() {
            return Err(wrong(number, reason.to_string()));
        }
        if find(&outcomes, &outcome.run).is_some() {
            let reason = format!("{} occurs for the second time", outcome.run);
            return Err(wrong(number, reason));
        }
        outcomes.push(outcome);
        complete += content.len();
    }
    let results = Results {
        name: header.name,
        conditions: header.conditions,
        outcomes,
    };
    Ok((results, complete))
}

fn find<'a>(outcomes: &'a [Outcome], run: &Run) -> Option<&'a Outcome> {
    outcomes.iter().find(|outcome| outcome.run == *run)
}

fn line(content: &impl Serialize) -> io::Result<String> {
    let mut line = serde_json::to_string(content)?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::evidence::{Preset, Setting, examples};

    fn protocol() -> Protocol {
        Preset::Quick.protocol(Setting::example(&["Gewebe, geprüft"]))
    }

    /// The first outcomes of the protocol, as a runner would have them.
    fn outcomes(protocol: &Protocol, count: usize) -> Vec<Outcome> {
        let runs = protocol.plan(&[]).into_iter().take(count);
        runs.map(|run| Outcome {
            protocol: protocol.identity(),
            ..examples::search(run, 0.1)
        })
        .collect()
    }

    /// A file with three outcomes.
    fn written(path: &Path) -> Vec<Outcome> {
        let protocol = protocol();
        let outcomes = outcomes(&protocol, 3);
        let mut ledger = Ledger::open(path, &protocol).unwrap();
        for outcome in &outcomes {
            ledger.append(outcome.clone()).unwrap();
        }
        outcomes
    }

    fn reopened(path: &Path) -> Result<Vec<Outcome>, String> {
        Ledger::open(path, &protocol())
            .map(|ledger| ledger.outcomes().to_vec())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_killed_comparison_resumes_wherever_it_was_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        let outcomes = written(&path);
        let whole = fs::read(&path).unwrap();
        let ends: Vec<usize> = (0..whole.len()).filter(|&i| whole[i] == b'\n').collect();
        // Around the ends of lines every byte, within a character too, and elsewhere a sample.
        let umlaut = whole.iter().rposition(|byte| !byte.is_ascii());
        let edges = ends.iter().flat_map(|end| end.saturating_sub(1)..=end + 1);
        let lengths = edges.chain((0..whole.len()).step_by(149)).chain(umlaut);
        for length in lengths {
            fs::write(&path, &whole[..length]).unwrap();
            let kept = ends.iter().filter(|&&end| end <= length).count();
            let kept = kept.saturating_sub(1);
            assert_eq!(reopened(&path).unwrap(), outcomes[..kept], "{length}");
            let mut ledger = Ledger::open(&path, &protocol()).unwrap();
            for outcome in &outcomes[kept..] {
                ledger.append(outcome.clone()).unwrap();
            }
            assert!(fs::read(&path).unwrap() == whole, "{length}");
        }
    }

    #[test]
    fn garbage_in_the_middle_is_an_error_that_names_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        written(&path);
        let whole = fs::read_to_string(&path).unwrap();
        let mut lines: Vec<&str> = whole.lines().collect();
        lines[2] = &lines[2][..40];
        let damaged = lines.join("\n") + "\n";
        fs::write(&path, &damaged).unwrap();
        let message = reopened(&path).unwrap_err();
        assert!(message.contains("results.jsonl, line 3:"), "{message}");
        assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
    }

    #[test]
    fn a_file_of_something_else_is_refused_and_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        for content in [
            "my notes",
            "my notes\n",
            "{}\n",
            "{",
            "{\"name\":\"quick\"}\n",
        ] {
            // What begins like a head and goes no further cannot be told from one.
            if protocol_head().starts_with(content) {
                continue;
            }
            fs::write(&path, content).unwrap();
            let message = reopened(&path).unwrap_err();
            assert!(message.contains("notes.txt, line 1:"), "{message}");
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
    }

    fn protocol_head() -> String {
        line(&protocol().header()).unwrap()
    }

    #[test]
    fn results_of_another_protocol_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        written(&path);
        let mut other = protocol();
        other.conditions.epochs = 77;
        let message = Ledger::open(&path, &other).unwrap_err().to_string();
        for named in [protocol().identity(), other.identity()] {
            assert!(message.contains(&named), "{message}");
        }
        assert!(message.contains("epochs 5 there and 77 here"), "{message}");
        assert_eq!(reopened(&path).unwrap().len(), 3);
    }

    #[test]
    fn a_second_writer_is_refused_until_the_first_one_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        let first = Ledger::open(&path, &protocol()).unwrap();
        let message = reopened(&path).unwrap_err();
        assert!(
            message.contains("in use by another comparison"),
            "{message}"
        );
        drop(first);
        assert_eq!(reopened(&path).unwrap(), []);
    }

    #[test]
    fn an_outcome_that_does_not_belong_is_refused_and_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        let outcomes = written(&path);
        let whole = fs::read(&path).unwrap();
        let mut ledger = Ledger::open(&path, &protocol()).unwrap();

        let twice = outcomes[1].clone();
        let mut foreign = self::outcomes(&protocol(), 4)[3].clone();
        let mut peeking = foreign.clone();
        foreign.protocol = "vtab-1k-0".to_string();
        peeking.measured = examples::tested(peeking.run.clone(), &[true]).measured;
        for (outcome, named) in [
            (twice, "there already"),
            (foreign, "vtab-1k-0"),
            (peeking, "must not look at test images"),
        ] {
            let message = ledger.append(outcome).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn results_can_be_read_while_a_comparison_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        let outcomes = written(&path);
        let _writer = Ledger::open(&path, &protocol()).unwrap();
        let results = Results::read(&path).unwrap();
        assert_eq!(results.outcomes, outcomes);
        assert_eq!(results.conditions, protocol().conditions);
    }
}
