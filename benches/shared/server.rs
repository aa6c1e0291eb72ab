//! A program that takes turns with others.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A program that runs one step for each line it reads.
pub struct Server {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    /// Starts a program.
    ///
    /// # Errors
    ///
    /// - If the program is not there, or may not be run.
    pub fn start(command: &mut Command) -> Result<Self, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{name} does not start: {error}"))?;
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("its output is piped"));
        Ok(Self {
            child,
            requests,
            answers,
        })
    }

    /// Milliseconds of one step.
    ///
    /// # Errors
    ///
    /// - If the program has ended, or answers with something else than a number.
    pub fn step(&mut self, case: &str, method: &str) -> Result<f64, String> {
        let question = format!("{case} {method}");
        let answer = self
            .ask(&question)
            .map_err(|error| format!("no answer to `{question}`: {error}"))?;
        let answer = answer.trim();
        answer
            .parse()
            .map_err(|_| format!("the answer to `{question}` is `{answer}`"))
    }

    fn ask(&mut self, question: &str) -> io::Result<String> {
        let requests = self.requests.as_mut().expect("its input is piped");
        writeln!(requests, "{question}")?;
        requests.flush()?;
        let mut line = String::new();
        match self.answers.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The program ends when its input ends.
        self.requests = None;
        let _ = self.child.wait();
    }
}
