"""Other packages' functions over Inlay's ops, one file a package: change the import and keep the calls.

What a package's argument asks for and Inlay does not have raises ``NotImplementedError`` with the argument's name.
"""
