//! A job that is set up before it starts: its values, its program, its input.

use super::super::error::MachineError;
use super::super::input::Input;
use super::super::setup::{Field, Setup};
use super::{Inner, Job};
use std::sync::Arc;
use std::time::SystemTime;

fn started() -> MachineError {
    MachineError::busy("the job has started: its set-up cannot change any more")
}

impl Job {
    /// The same, to be set up and started by hand.
    pub(in super::super) fn with_setup(self) -> Job {
        self.inner.lock().setup = Setup::open();
        self
    }

    /// Whether it is being set up.
    pub fn is_being_set_up(&self) -> bool {
        self.inner.lock().setup.open
    }

    /// What was said of it.
    pub(in super::super) fn setup(&self) -> Setup {
        self.inner.lock().setup.clone()
    }

    /// A value, as it can be written back.
    pub fn field(&self, field: Field) -> Vec<u8> {
        self.inner.lock().setup.text(field)
    }

    /// Checks a value without setting it.
    ///
    /// # Errors
    /// EBUSY when it has started, EINVAL.
    pub fn check_field(&self, field: Field, value: &[u8]) -> Result<(), MachineError> {
        self.open_setup()?.set(field, value)
    }

    /// Sets a value.
    ///
    /// # Errors
    /// As [`Job::check_field`].
    pub fn set_field(&self, field: Field, value: &[u8]) -> Result<(), MachineError> {
        self.change(|setup| setup.set(field, value))
    }

    /// The program and its arguments, each with a NUL behind it.
    pub fn argv(&self) -> Vec<u8> {
        self.inner.lock().setup.argv_text()
    }

    /// Checks a program and its arguments; gives the program.
    ///
    /// # Errors
    /// EBUSY when it has started, EINVAL.
    pub(in super::super) fn check_argv(&self, value: &[u8]) -> Result<Vec<u8>, MachineError> {
        let mut setup = self.open_setup()?;
        setup.set_argv(value)?;
        Ok(setup.argv.into_iter().next().unwrap_or_default())
    }

    /// Sets the program and its arguments; gives them as a line for people.
    ///
    /// # Errors
    /// As [`Job::check_argv`].
    pub(in super::super) fn set_argv(&self, value: &[u8]) -> Result<Vec<u8>, MachineError> {
        self.change(|setup| setup.set_argv(value).map(|()| setup.argv_line()))
    }

    /// Gives a job of the machine's own its program: no list of allowed ones is for it.
    pub(in super::super) fn give_argv(&self, argv: Vec<Vec<u8>>) {
        self.inner.lock().setup = Setup::own(argv);
    }

    fn open_setup(&self) -> Result<Setup, MachineError> {
        let setup = self.setup();
        if setup.open { Ok(setup) } else { Err(started()) }
    }

    fn change<T>(&self, work: impl FnOnce(&mut Setup) -> Result<T, MachineError>) -> Result<T, MachineError> {
        let mut inner = self.inner.lock();
        let Inner { setup, modified, .. } = &mut *inner;
        if !setup.open {
            return Err(started());
        }
        let done = work(setup)?;
        *modified = SystemTime::now();
        Ok(done)
    }

    /// Somebody writes its script: nobody else may meanwhile.
    ///
    /// # Errors
    /// EBUSY when it has started, or somebody else writes it.
    pub fn claim(&self) -> Result<(), MachineError> {
        let mut inner = self.inner.lock();
        if !inner.setup.open {
            return Err(started());
        }
        if std::mem::replace(&mut inner.claimed, true) {
            return Err(MachineError::busy("somebody else writes the job's script just now"));
        }
        Ok(())
    }

    /// The script was not written after all.
    pub fn unclaim(&self) {
        self.inner.lock().claimed = false;
    }

    /// It is set up, and starts: from now on nothing of that changes.
    ///
    /// # Errors
    /// EBUSY when it has started already.
    pub(in super::super) fn close_setup(&self) -> Result<(), MachineError> {
        let mut inner = self.inner.lock();
        if std::mem::replace(&mut inner.submitted, true) {
            return Err(started());
        }
        let terminal = inner.setup.has_terminal();
        inner.setup.input = self.input.settle(terminal);
        inner.setup.open = false;
        Ok(())
    }

    /// What is written to it.
    pub fn input(&self) -> &Arc<Input> {
        &self.input
    }
}
