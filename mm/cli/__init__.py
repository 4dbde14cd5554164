"""One thin command for each job; `mm COMMAND --help` lists its flags."""
